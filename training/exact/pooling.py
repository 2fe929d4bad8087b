"""Pooling nodes as layers: a maximum moves bytes, a mean is a sum whose division the next scale carries."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from training.errors import NotConvertible
from training.exact.network import AveragePool, Layer, Move


def max_pool(node: onnx.NodeProto, x: str, shape: Sequence[int], pooled: Sequence[int]) -> Move:
    """Return a MaxPool with its padding written out: `shape` (C, *space) in, `pooled` out."""
    given = _attributes(node)
    kernel = given["kernel_shape"]
    spatial = len(kernel)
    strides, dilations = given.get("strides", [1] * spatial), given.get("dilations", [1] * spatial)
    pads = list(given.get("pads", [0] * 2 * spatial))
    _refuse_auto_pad(node, given)
    for axis in range(spatial):
        reach = (pooled[axis + 1] - 1) * strides[axis] + dilations[axis] * (kernel[axis] - 1) + 1
        pads[axis + spatial] = max(0, reach - shape[axis + 1] - pads[axis])
    name = node.name or node.output[0]
    written = helper.make_node(
        "MaxPool",
        [x],
        [node.output[0]],
        name=name,
        kernel_shape=kernel,
        strides=strides,
        dilations=dilations,
        pads=pads,
    )
    return Move(name, (x,), (node.output[0],), written, {})


def average_pool(node: onnx.NodeProto, x: str, shape: Sequence[int], axes: NDArray[np.int64] | None) -> list[Layer]:
    """Return AveragePool, GlobalAveragePool or ReduceMean over all space (`axes`) as layers; `shape` is (C, *space)."""
    given, (channels, *space) = _attributes(node), shape
    name, y = node.name or node.output[0], node.output[0]
    if node.op_type == "AveragePool":
        return [_windowed(node, given, x, channels, space)]
    ones, none = (1,) * len(space), (0,) * 2 * len(space)
    if node.op_type == "GlobalAveragePool" or given.get("keepdims", 1):
        _check_axes(node, given, axes, len(space))
        return [AveragePool(name, x, y, channels, tuple(space), ones, none)]
    _check_axes(node, given, axes, len(space))
    flat = helper.make_node("Flatten", [f"{y}/pooled"], [y], name=f"{name}/flatten", axis=1)
    pooled = AveragePool(name, x, f"{y}/pooled", channels, tuple(space), ones, none)
    return [pooled, Move(f"{name}/flatten", (f"{y}/pooled",), (y,), flat, {})]


def _windowed(node: onnx.NodeProto, given: dict[str, Any], x: str, channels: int, space: Sequence[int]) -> AveragePool:
    kernel = tuple(given["kernel_shape"])
    pads = tuple(given.get("pads", [0] * 2 * len(kernel)))
    strides = tuple(given.get("strides", [1] * len(kernel)))
    name = node.name or node.output[0]
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
    if node.op_type != "ReduceMean":
        return
    found = given.get("axes") if axes is None else axes.tolist()
    rank = spatial + 2
    if found is None or sorted(axis % rank for axis in found) != list(range(2, rank)):
        raise NotConvertible(f"node {node.name or node.output[0]} (ReduceMean): it is not over an image's positions")


def _refuse_auto_pad(node: onnx.NodeProto, given: dict[str, Any]) -> None:
    if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise NotConvertible(f"node {node.name or node.output[0]} ({node.op_type}): its padding is not written out")


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}
