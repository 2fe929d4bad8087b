"""Grids moved by a hair where a function's table would hang on the last bit of a runtime's arithmetic."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from service.errors import NotExact
from service.integers.steps import Operand
from service.integers.tables import LEAST_ROOM, read_table
from training.errors import NotConvertible
from training.exact.grids import Grid
from training.exact.network import Function, Network, Pair

ROOM = 2 * LEAST_ROOM  # what export asks for, so that reading the file again never lacks room
HAIR = 1.0007  # what a scale grows by at each try; irrational enough to meet other fractions
MOST_TRIES = 200
OPSET = 20


def settle_tables(network: Network, grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """Return grids under which no table value lies near to where rounding turns.

    The function's own input is moved where only it is concerned, else its output. Raises NotConvertible where neither
    may move or no try helps.
    """
    settled = dict(grids)
    for layer in network.layers:
        if isinstance(layer, Function):
            _settle(layer, settled, _sharers(network, grids))
    return settled


def _sharers(network: Network, grids: Mapping[str, Grid]) -> dict[str, list[str]]:
    """Return for each tensor that may move the tensors that move with it; what is added or multiplied stays."""
    tied = {name for layer in network.layers if isinstance(layer, Pair) for name in (layer.a, layer.b, layer.y)}
    bound = {id(grids[name]) for name in tied}
    groups: dict[int, list[str]] = {}
    for name, grid in grids.items():
        groups.setdefault(id(grid), []).append(name)
    return {name: groups[id(grid)] for name, grid in grids.items() if id(grid) not in bound}


def _settle(layer: Function, grids: dict[str, Grid], sharers: Mapping[str, list[str]]) -> None:
    """Move one side, or the other: where a function saturates, its last value hangs on the output's grid alone."""
    if _room(layer, grids[layer.x], grids[layer.y]) >= ROOM:
        return
    for movable in (layer.x, layer.y):
        if movable not in sharers:
            continue
        moved = dict(grids)
        for _ in range(MOST_TRIES):
            coarser = replace(moved[movable], scale=moved[movable].scale * HAIR)
            moved.update(dict.fromkeys(sharers[movable], coarser))
            if _room(layer, moved[layer.x], moved[layer.y]) >= ROOM:
                grids.update(moved)
                return
    raise NotConvertible(f"layer {layer.name}: no grid keeps its 256 values clear of where rounding turns")


def _room(layer: Function, x: Grid, y: Grid) -> float:
    constants: dict[str, NDArray[np.float32]] = {
        name: value.astype(np.float32).reshape(()) for name, value in layer.constants.items()
    }
    sides = (Operand(name, float(np.float32(grid.scale)), grid.zero) for name, grid in ((layer.x, x), (layer.y, y)))
    try:
        return read_table(layer.name, layer.x, next(sides), layer.nodes, next(sides), constants, OPSET).room
    except NotExact as error:
        if "rounding turns" in str(error):
            return 0.0
        raise NotConvertible(str(error)) from None
