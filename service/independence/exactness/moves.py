"""The moves of exact models in NumPy: bytes change place, or the largest of some is taken."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import helper

from service.integers import Move
from service.integers.steps import BYTE

Bytes = NDArray[np.uint8]
Attributes = Mapping[str, Any]


def move(step: Move, inputs: Sequence[Bytes]) -> list[Bytes]:
    """Return the outputs of a Move for its inputs, in their order."""
    attributes = {one.name: helper.get_attribute_value(one) for one in step.node.attribute}
    return MOVES[step.node.op_type](step, attributes, list(inputs))


def _ints(step: Move, attributes: Attributes, position: int, name: str) -> list[int] | None:
    """Return a list that is an input in newer opsets and an attribute in older ones."""
    if position in step.constants:
        return [int(value) for value in np.atleast_1d(step.constants[position])]
    return list(attributes[name]) if name in attributes else None


def _transpose(_: Move, attributes: Attributes, inputs: list[Bytes]) -> list[Bytes]:
    return [inputs[0].transpose(attributes.get("perm"))]


def _clip(step: Move, _: Attributes, inputs: list[Bytes]) -> list[Bytes]:
    low, high = (int(step.constants.get(at, np.array(end)).reshape(())) for at, end in ((1, 0), (2, BYTE)))
    return [np.clip(inputs[0], low, high).astype(np.uint8)]


def _concat(_: Move, attributes: Attributes, inputs: list[Bytes]) -> list[Bytes]:
    return [np.concatenate(inputs, axis=attributes["axis"])]


def _split(step: Move, attributes: Attributes, inputs: list[Bytes]) -> list[Bytes]:
    sizes, axis = _ints(step, attributes, 1, "split"), attributes.get("axis", 0)
    parts: Any = len(step.outputs) if sizes is None else np.cumsum(sizes)[:-1]
    return list(np.split(inputs[0], parts, axis=axis))


def _pad(step: Move, attributes: Attributes, inputs: list[Bytes]) -> list[Bytes]:
    pads = _ints(step, attributes, 1, "pads") or []
    axes = _ints(step, attributes, 3, "axes") or list(range(inputs[0].ndim))
    edges = [(0, 0)] * inputs[0].ndim
    for place, axis in enumerate(axes):
        edges[axis] = pads[place], pads[place + len(axes)]
    return [np.pad(inputs[0], edges, constant_values=int(step.constants.get(2, np.zeros(1)).reshape(())))]


def _reshape(step: Move, _: Attributes, inputs: list[Bytes]) -> list[Bytes]:
    wanted = [int(side) for side in step.constants[1]]
    sides = [inputs[0].shape[axis] if side == 0 else side for axis, side in enumerate(wanted)]
    return [inputs[0].reshape(sides)]


def _flatten(_: Move, attributes: Attributes, inputs: list[Bytes]) -> list[Bytes]:
    axis = attributes.get("axis", 1)
    return [inputs[0].reshape(int(np.prod(inputs[0].shape[:axis])), -1)]


def _squeeze(step: Move, attributes: Attributes, inputs: list[Bytes]) -> list[Bytes]:
    return [inputs[0].squeeze(tuple(_ints(step, attributes, 1, "axes") or ()))]


def _unsqueeze(step: Move, attributes: Attributes, inputs: list[Bytes]) -> list[Bytes]:
    return [np.expand_dims(inputs[0], tuple(_ints(step, attributes, 1, "axes") or ()))]


def _slice(step: Move, attributes: Attributes, inputs: list[Bytes]) -> list[Bytes]:
    starts, ends = _ints(step, attributes, 1, "starts") or [], _ints(step, attributes, 2, "ends") or []
    axes = _ints(step, attributes, 3, "axes") or list(range(len(starts)))
    steps = _ints(step, attributes, 4, "steps") or [1] * len(starts)
    cut = [slice(None)] * inputs[0].ndim
    for axis, start, end, stride in zip(axes, starts, ends, steps, strict=True):
        cut[axis] = slice(start, end, stride)
    return [inputs[0][tuple(cut)]]


def _max_pool(_: Move, attributes: Attributes, inputs: list[Bytes]) -> list[Bytes]:
    """Return the largest of each window; what lies outside the image takes part as 0, the least there is."""
    kernel, x = attributes["kernel_shape"], inputs[0]
    spatial = len(kernel)
    dilations, pads = attributes.get("dilations", [1] * spatial), attributes.get("pads", [0] * 2 * spatial)
    edges = [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)]
    reach = tuple(dilation * (side - 1) + 1 for side, dilation in zip(kernel, dilations, strict=True))
    windows = sliding_window_view(np.pad(x, edges), reach, axis=tuple(range(2, x.ndim)))
    strides = [slice(None, None, one) for one in (*attributes.get("strides", [1] * spatial), *dilations)]
    return [windows[:, :, *strides].max(axis=tuple(range(x.ndim, x.ndim + spatial)))]


MOVES: dict[str, Callable[[Move, Attributes, list[Bytes]], list[Bytes]]] = {
    "Clip": _clip,
    "Concat": _concat,
    "Flatten": _flatten,
    "Identity": lambda _step, _attributes, inputs: inputs,
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
