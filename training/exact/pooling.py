"""Pooling nodes as layers: a maximum moves bytes, a mean is a sum whose division the next scale carries."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from training.errors import NotConvertible
from training.exact.network import AveragePool, Layer, Move
from training.exact.nodes import attributes, where


def max_pool(node: onnx.NodeProto, x: str, shape: Sequence[int], pooled: Sequence[int]) -> Move:
    """Return a MaxPool with its padding written out: `shape` (C, *space) in, `pooled` out."""
    given = attributes(node)
    kernel = given["kernel_shape"]
    spatial = len(kernel)
    strides, dilations = given.get("strides", [1] * spatial), given.get("dilations", [1] * spatial)
    pads = list(given.get("pads", [0] * 2 * spatial))
    _refuse_auto_pad(node, given)
    for axis in range(spatial):
        reach = (pooled[axis + 1] - 1) * strides[axis] + dilations[axis] * (kernel[axis] - 1) + 1
        pads[axis + spatial] = max(0, reach - shape[axis + 1] - pads[axis])
    return _largest(where(node), x, node.output[0], kernel, strides=strides, dilations=dilations, pads=pads)


def _largest(name: str, x: str, y: str, kernel: Sequence[int], **given: Any) -> Move:
    written = helper.make_node("MaxPool", [x], [y], name=name, kernel_shape=kernel, **given)
    return Move(name, (x,), (y,), written, {})


def largest_of_all(node: onnx.NodeProto, x: str, shape: Sequence[int], axes: NDArray[np.int64] | None) -> list[Layer]:
    """Return GlobalMaxPool or ReduceMax over all space (`axes`) as layers; `shape` is (C, *space)."""
    given, space = attributes(node), shape[1:]
    _check_axes(node, given, axes, len(space))
    ones, none = [1] * len(space), [0] * 2 * len(space)
    y = _unflattened(node, given)
    return [_largest(where(node), x, y, space, strides=ones, dilations=ones, pads=none), *_flattened(node, given)]


def average_pool(node: onnx.NodeProto, x: str, shape: Sequence[int], axes: NDArray[np.int64] | None) -> list[Layer]:
    """Return AveragePool, GlobalAveragePool or ReduceMean over all space (`axes`) as layers; `shape` is (C, *space)."""
    given, (channels, *space) = attributes(node), shape
    if node.op_type == "AveragePool":
        return [_windowed(node, given, x, channels, space)]
    _check_axes(node, given, axes, len(space))
    ones, none = (1,) * len(space), (0,) * 2 * len(space)
    pooled = AveragePool(where(node), x, _unflattened(node, given), channels, tuple(space), ones, none)
    return [pooled, *_flattened(node, given)]


def _keeps_positions(node: onnx.NodeProto, given: dict[str, Any]) -> bool:
    return node.op_type.startswith("Global") or bool(given.get("keepdims", 1))


def _unflattened(node: onnx.NodeProto, given: dict[str, Any]) -> str:
    y: str = node.output[0]
    return y if _keeps_positions(node, given) else f"{y}/pooled"


def _flattened(node: onnx.NodeProto, given: dict[str, Any]) -> list[Layer]:
    """Return the layer that drops the one position left, where the node does so."""
    if _keeps_positions(node, given):
        return []
    x, y, name = _unflattened(node, given), node.output[0], f"{where(node)}/flatten"
    return [Move(name, (x,), (y,), helper.make_node("Flatten", [x], [y], name=name, axis=1), {})]


def _windowed(node: onnx.NodeProto, given: dict[str, Any], x: str, channels: int, space: Sequence[int]) -> AveragePool:
    kernel = tuple(given["kernel_shape"])
    pads = tuple(given.get("pads", [0] * 2 * len(kernel)))
    strides = tuple(given.get("strides", [1] * len(kernel)))
    name = where(node)
    _refuse_auto_pad(node, given)
    if any(pads) and not given.get("count_include_pad"):
        raise NotConvertible(f"node {name} (AveragePool): windows at the edge divide by another count")
    ends = zip(space, kernel, strides, pads[: len(kernel)], pads[len(kernel) :], strict=True)
    if given.get("ceil_mode") and any((side + a + b - size) % step for side, size, step, a, b in ends):
        raise NotConvertible(f"node {name} (AveragePool): its last windows reach over the edge (ceil_mode)")
    if any(one != 1 for one in given.get("dilations", [1])):
        raise NotConvertible(f"node {name} (AveragePool): its windows have holes (dilations)")
    return AveragePool(name, x, node.output[0], channels, kernel, strides, pads)


def _check_axes(node: onnx.NodeProto, given: dict[str, Any], axes: NDArray[np.int64] | None, spatial: int) -> None:
    if node.op_type.startswith("Global"):
        return
    found = given.get("axes") if axes is None else axes.tolist()
    rank = spatial + 2
    if found is None or sorted(axis % rank for axis in found) != list(range(2, rank)):
        raise NotConvertible(f"node {where(node)} ({node.op_type}): it is not over an image's positions")


def _refuse_auto_pad(node: onnx.NodeProto, given: dict[str, Any]) -> None:
    if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise NotConvertible(f"node {where(node)} ({node.op_type}): its padding is not written out")
