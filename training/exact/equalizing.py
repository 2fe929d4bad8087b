"""Cross-layer equalization: per-channel scales moved from one layer to the next, so that no channel is coarse.

ReLU(s·x) = s·ReLU(x) for s > 0, so what is divided out of a convolution's output channel can be multiplied into the
input channel of the next one, and the network computes the same (Nagel et al. 2019, section 4.1).
"""

import copy
from collections.abc import Iterator, Mapping

import numpy as np

from training.exact.calibration import Observed
from training.exact.network import Conv, Layer, Linear, Move, Network, outputs_of

MOST = 8.0  # a channel's scale moves by no more than this


def equalize(network: Network, observed: Mapping[str, Observed]) -> tuple[Network, int]:
    """Return a network that computes the same with evener channels, and how many pairs of layers were evened."""
    evened = copy.deepcopy(network)
    pairs = list(_pairs(evened))
    for first, second, tensor in pairs:
        activations = observed[tensor].largest
        weights = np.abs(second.weight).reshape(len(second.weight), second.weight.shape[1], -1).max(axis=(0, 2))
        usable = (activations > 0) & (weights > 0)
        moved = np.ones(len(activations))
        moved[usable] = np.sqrt(activations[usable] / weights[usable])
        moved[usable] /= np.exp(np.log(moved[usable]).mean()) if usable.any() else 1.0
        moved = np.clip(moved, 1 / MOST, MOST)
        first.weight = first.weight / moved.reshape(-1, *[1] * (first.weight.ndim - 1))
        first.bias = first.bias / moved
        second.weight = second.weight * moved.reshape(1, -1, *[1] * (second.weight.ndim - 2))
    return evened, len(pairs)


def _pairs(network: Network) -> Iterator[tuple[Conv, Conv | Linear, str]]:
    """Yield convolutions whose only reader is one undivided convolution, with nothing but a ReLU and moves between."""
    readers = network.readers()
    for layer in network.layers:
        if not isinstance(layer, Conv) or layer.high is not None or layer.low not in (None, 0.0):
            continue
        tensor: str | None = layer.y
        while tensor is not None:
            following = readers.get(tensor, [])
            if len(following) != 1:
                break
            (reader,) = following
            if isinstance(reader, Conv) and reader.groups == 1:
                yield layer, reader, layer.y
            tensor = outputs_of(reader)[0] if _keeps_channels(reader) else None


def _keeps_channels(layer: Layer) -> bool:
    return isinstance(layer, Move) and layer.node.op_type == "MaxPool"
