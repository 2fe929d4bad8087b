"""A short training of the folded network with the rounding in place: weights learn to live on their grids.

Rounding has no slope, so the gradient passes straight through it (Bengio et al. 2013). Grids stay as calibrated.
"""

import copy
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as fn
from torch import Tensor

from service.integers.steps import BYTE
from training.exact.checking import Labelled
from training.exact.executing import run, standardise
from training.exact.grids import Grid
from training.exact.network import Conv, Linear, Network

EPOCHS = 3
BATCH = 64
LEARNING_RATE = 1e-4
LARGEST_WEIGHT = 127


def fine_tune(
    network: Network, grids: Mapping[str, Grid], labelled: Labelled, report: Callable[[str, float], None]
) -> Iterator[Network]:
    """Yield the network after each of EPOCHS epochs of Adam; the one given is left alone."""
    tuned = copy.deepcopy(network)
    layers = list(tuned.weighted())
    weights = {id(layer): _parameters(layer) for layer in layers}
    optimizer = torch.optim.Adam([one for pair in weights.values() for one in pair], lr=LEARNING_RATE)
    shuffle = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        order = shuffle.permutation(len(labelled.images))
        for start in range(0, len(order), BATCH):
            picked = order[start : start + BATCH]
            logits = _rounded_logits(tuned, grids, weights, standardise(tuned, labelled.images[picked]))
            loss = fn.cross_entropy(logits, torch.from_numpy(labelled.targets[picked].astype(np.int64)))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            report("fine-tuning", (epoch + start / len(order)) / EPOCHS)
        for layer in layers:
            layer.weight, layer.bias = (one.detach().double().numpy().copy() for one in weights[id(layer)])
        yield copy.deepcopy(tuned)


def _parameters(layer: Conv | Linear) -> tuple[Tensor, Tensor]:
    weight, bias = (torch.from_numpy(one).float().clone().requires_grad_() for one in (layer.weight, layer.bias))
    return weight, bias


def _rounded_logits(
    network: Network, grids: Mapping[str, Grid], weights: Mapping[int, tuple[Tensor, Tensor]], standardised: Tensor
) -> Tensor:
    def observe(name: str, values: Tensor) -> Tensor:
        return _on_grid(values, grids[name]) if name in grids else values

    def weigh(layer: Conv | Linear) -> tuple[Tensor, Tensor]:
        weight, bias = weights[id(layer)]
        return _rounded_weight(weight), bias

    return run(network, standardised, observe, weigh)


def _on_grid(values: Tensor, grid: Grid) -> Tensor:
    bounded = torch.clamp(values, -grid.zero * grid.scale, (BYTE - grid.zero) * grid.scale)
    return _straight_through(bounded, torch.round(bounded / grid.scale) * grid.scale)


def _rounded_weight(weight: Tensor) -> Tensor:
    step = weight.detach().reshape(len(weight), -1).abs().amax(1) / LARGEST_WEIGHT
    step = step.clamp_min(torch.finfo(torch.float32).tiny).reshape(-1, *[1] * (weight.ndim - 1))
    return _straight_through(weight, torch.round(weight / step) * step)


def _straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, with the slope of `values`."""
    return values + (rounded - values).detach()
