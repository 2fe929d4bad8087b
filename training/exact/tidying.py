"""A network as read → as it is converted: layers clip for themselves, and pixels go into one convolution."""

import numpy as np

from training.exact.network import Clipped, Conv, Function, Move, Network, Pair
from training.exact.nodes import attributes


def merge_clips(network: Network) -> None:
    """Let the layer before a ReLU or Clip do the clipping, where nothing else reads what it clips."""
    readers, makers = network.readers(), network.makers()
    for layer in list(network.layers):
        limits = _limits(layer) if isinstance(layer, Function) else None
        maker = makers.get(layer.x) if isinstance(layer, Function) else None
        if limits is None or not isinstance(layer, Function) or not isinstance(maker, Clipped) or maker.low is not None:
            continue
        if maker.high is None and len(readers[layer.x]) == 1:
            (maker.low, maker.high), maker.y = limits, layer.y
            makers[layer.y] = maker
            network.layers.remove(layer)


def begin_with_convolution(network: Network) -> None:
    """Put a convolution that changes nothing in front, where the pixels do not go into one convolution alone."""
    readers = network.readers().get(network.image, [])
    if len(readers) == 1 and isinstance(readers[0], Conv):
        return
    channels, y = len(network.scale), f"{network.image}/same"
    for layer in (*network.layers, network.head):
        if isinstance(layer, Move):
            layer.inputs = tuple(y if name == network.image else name for name in layer.inputs)
        elif isinstance(layer, Pair):
            layer.a, layer.b = (y if name == network.image else name for name in (layer.a, layer.b))
        elif layer.x == network.image:
            layer.x = y
    weight = np.ones((channels, 1, 1, 1))
    same = Conv(y, network.image, y, weight, np.zeros(channels), (1, 1), (0,) * 4, (1, 1), channels)
    network.layers.insert(0, same)


def _limits(function: Function) -> tuple[float | None, float | None] | None:
    """Return the limits of a function that only clips, else None."""
    (node, *more) = function.nodes
    if more or node.op_type not in ("Relu", "Clip"):
        return None
    if node.op_type == "Relu":
        return 0.0, None
    given = attributes(node)
    values = [function.constants.get(name) for name in node.input[1:]]
    low, high = ([None if value is None else float(value.reshape(())) for value in values] + [None, None])[:2]
    return low if low is not None else given.get("min"), high if high is not None else given.get("max")
