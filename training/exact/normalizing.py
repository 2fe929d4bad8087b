"""The first nodes of an artifact: from uint8 pixels, channels last, to the standardised tensor that layers read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from training.errors import NotConvertible

Array = NDArray[Any]
ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})


@dataclass(frozen=True, slots=True)
class Normalization:
    """`tensor` is pixels · scale + shift, both (channels,) float64; it took the first `nodes` nodes."""

    tensor: str
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    nodes: int


def read_normalization(
    image: str, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Array], readers: Mapping[str, int]
) -> Normalization:
    """Read Transpose → Cast → multiply-adds by constants, as long as one node follows the other.

    Raises NotConvertible where the graph begins in another way.
    """
    wanted = ("Transpose", "Cast")
    begin = tuple(node.op_type for node in nodes[:2])
    if begin != wanted or nodes[0].input[0] != image or nodes[1].input[0] != nodes[0].output[0]:
        raise NotConvertible(f"the graph begins with {' and '.join(begin)}, expected {' and '.join(wanted)} of pixels")
    tensor, taken = nodes[1].output[0], 2
    scale, shift = np.ones(1), np.zeros(1)
    for node in nodes[2:]:
        if node.op_type not in ARITHMETIC or readers[tensor] != 1 or node.input[0] != tensor:
            break
        value = constants.get(node.input[1])
        if value is None:
            break
        scale, shift = _apply(node.op_type, scale, shift, value.astype(np.float64).reshape(-1))
        tensor, taken = node.output[0], taken + 1
    both = np.broadcast_arrays(scale, shift)
    return Normalization(tensor, both[0].copy(), both[1].copy(), taken)


def _apply(operator: str, scale: Array, shift: Array, value: Array) -> tuple[Array, Array]:
    if operator in ("Add", "Sub"):
        return scale, shift + (value if operator == "Add" else -value)
    factor = value if operator == "Mul" else 1 / value
    return scale * factor, shift * factor
