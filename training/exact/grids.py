"""Which real numbers the 256 values of each tensor stand for.

A grid is a scale and a zero point. Tensors that move into one another share a grid; tensors that are added or
multiplied have scales that are powers of two apart, so that the sum is exact. Scales minimise the squared error on
the calibration sample: cutting rare extremes off makes all other values finer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.integers.steps import BYTE
from training.errors import NotConvertible
from training.exact.calibration import Observed
from training.exact.network import Clipped, Layer, Move, Network, Pair, outputs_of

CUTS = np.geomspace(1.0, 0.2, 24)  # shares of the observed range that are tried
BINS = 1024
ADDED_BITS = 14  # operands of a sum may lie so many powers of two apart: 10 bits and these fit float32's 24


@dataclass(frozen=True, slots=True)
class Grid:
    """Byte q stands for (q − zero) · scale; `zero` is even, so that ties round alike before and after it is added."""

    scale: float
    zero: int


def choose_grids(network: Network, observed: Mapping[str, Observed]) -> dict[str, Grid]:
    """Return the grid of every tensor but the image and the logits. Raises NotConvertible for a constant tensor."""
    groups = _Groups(network)
    wanted = {root: _ideal(root, members, network, observed) for root, members in groups.shared().items()}
    grids = {root: grid for root, grid in wanted.items() if root not in groups.tied}
    for roots in groups.ties():
        grids |= _tie({root: wanted[root] for root in roots})
    _settle_products(network, groups, grids)
    return {name: grids[groups.root(name)] for name in groups.names}


class _Groups:
    """Who shares a grid with whom, and whose scales are tied by powers of two: two union-finds."""

    def __init__(self, network: Network) -> None:
        self.names = [name for layer in network.layers for name in outputs_of(layer)]
        self._same = {name: name for name in self.names}
        self._tie = dict(self._same)
        self.tied: set[str] = set()
        for layer in network.layers:
            if isinstance(layer, Move):
                for name in (*layer.inputs[1:], *layer.outputs):
                    self._join(self._same, layer.inputs[0], name)
        pairs = [layer for layer in network.layers if isinstance(layer, Pair)]
        for pair in pairs:
            self._join_pair(pair)

    def root(self, name: str) -> str:
        return self._find(self._same, name)

    def shared(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(self.root(name), []).append(name)
        return found

    def ties(self) -> list[set[str]]:
        found: dict[str, set[str]] = {}
        for root in self.tied:
            found.setdefault(self._find(self._tie, root), set()).add(root)
        return list(found.values())

    def _join_pair(self, pair: Pair) -> None:
        a, b, y = (self.root(name) for name in (pair.a, pair.b, pair.y))
        self.tied |= {a, b, y}
        self._join(self._tie, a, y)
        if pair.operation == "Add":
            self._join(self._tie, b, y)

    def _join(self, parents: dict[str, str], first: str, second: str) -> None:
        if first in parents and second in parents:
            parents[self._find(parents, second)] = self._find(parents, first)

    def _find(self, parents: dict[str, str], name: str) -> str:
        while parents[name] != name:
            name = parents[name]
        return name


def _ideal(root: str, members: list[str], network: Network, observed: Mapping[str, Observed]) -> Grid:
    """Return the grid of least squared error for tensors that share one."""
    makers = network.makers()
    sample = np.concatenate([observed[name].sample for name in members])
    low, high = min(observed[name].low for name in members), max(observed[name].high for name in members)
    if all(_is_clipped_at_zero(makers[name]) for name in members if not isinstance(makers[name], Move)):
        low = max(low, 0.0)
    if high <= low or not math.isfinite(high - low):
        raise NotConvertible(
            f"layer {makers[root].name} gives {high:.4g} for every calibration image: a dead or constant layer, "
            "or images that are all alike"
        )
    low, high = min(low, 0.0), max(high, 0.0)
    counted = np.histogram(sample, BINS)  # once: it is most of the work
    return min((_grid(low * cut, high * cut) for cut in CUTS), key=lambda grid: _squared_error(grid, *counted))


def _is_clipped_at_zero(layer: Layer) -> bool:
    return isinstance(layer, Clipped) and layer.low == 0.0


def _grid(low: float, high: float) -> Grid:
    scale = (high - low) / BYTE
    zero = min(BYTE - 1, 2 * math.ceil(-low / scale / 2)) if low < 0 else 0
    return Grid(scale, zero)


def _squared_error(grid: Grid, counts: NDArray[np.int64], edges: NDArray[np.floating[Any]]) -> float:
    """Return what the grid costs a sample that was counted in bins: cut-off extremes, and a uniform error elsewhere."""
    centres = (edges[:-1] + edges[1:]) / 2
    low, high = -grid.zero * grid.scale, (BYTE - grid.zero) * grid.scale
    cut = np.where(centres > high, centres - high, np.where(centres < low, low - centres, 0.0))
    inside = (cut == 0) & (np.abs(centres) > (edges[1] - edges[0]))
    return float((counts * (cut**2 + inside * grid.scale**2 / 12)).sum())


def _tie(wanted: Mapping[str, Grid]) -> dict[str, Grid]:
    """Return grids whose scales are powers of two apart, each about as fine as wanted.

    Every tensor's own fraction of an octave is tried as the common one; a scale may shrink by a tenth of an octave,
    which cuts extremes off, and else grows.
    """
    octaves = {root: math.log2(grid.scale) for root, grid in wanted.items()}

    def waste(base: float) -> float:
        return sum(_rounded_up(octave - base) - (octave - base) for octave in octaves.values())

    base = min((octave % 1 for octave in octaves.values()), key=waste)
    exponents = {root: _rounded_up(octave - base) for root, octave in octaves.items()}
    floor = max(exponents.values()) - ADDED_BITS
    return {root: _rescaled(wanted[root], 2.0 ** (base + max(exponent, floor))) for root, exponent in exponents.items()}


def _rounded_up(octave: float) -> int:
    return math.ceil(octave - 0.1)


def _rescaled(grid: Grid, scale: float) -> Grid:
    return Grid(scale, 2 * round(grid.zero * grid.scale / scale / 2))


def _settle_products(network: Network, groups: _Groups, grids: dict[str, Grid]) -> None:
    """Give the factors of products scales that are powers of two themselves: b's alone decides a·b's."""
    for layer in network.layers:
        if isinstance(layer, Pair) and layer.operation == "Mul":
            root = groups.root(layer.b)
            exponent = _rounded_up(math.log2(grids[root].scale))
            if len(next(tie for tie in groups.ties() if root in tie)) > 1:
                raise NotConvertible(f"layer {layer.name}: a factor of a product is added elsewhere")
            grids[root] = _rescaled(grids[root], 2.0**exponent)
