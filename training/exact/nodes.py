"""What reading asks of an ONNX graph and its nodes, whatever they compute."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]


def stored_constants(graph: onnx.GraphProto) -> tuple[dict[str, Array], list[onnx.NodeProto]]:
    """Return the stored arrays, those of Constant nodes among them, and the other nodes."""
    found = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    rest = []
    for node in graph.node:
        value = attributes(node).get("value") if node.op_type == "Constant" else None
        if value is not None:
            found[node.output[0]] = numpy_helper.to_array(value)
        else:
            rest.append(node)
    return found, rest


def known_shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape without the batch, where all of it is known."""
    shapes = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim[1:]
        if value.type.tensor_type.HasField("shape") and all(dim.dim_value > 0 for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def live_nodes(nodes: Iterable[onnx.NodeProto], logits: str) -> list[onnx.NodeProto]:
    """Return the nodes that the logits hang on, in order; what only computes a shape of a Reshape is not among them."""
    wanted, live = {logits}, []
    for node in reversed(list(nodes)):
        if wanted & set(node.output):
            live.append(node)
            wanted.update(node.input[:1] if node.op_type == "Reshape" else node.input)
    return live[::-1]


def count_readers(nodes: Iterable[onnx.NodeProto], logits: str) -> dict[str, int]:
    """Return how many nodes read each tensor; the caller of the model reads the logits."""
    counts = {logits: 1}
    for node in nodes:
        for name in set(node.input):
            counts[name] = counts.get(name, 0) + 1
    return counts


def per_channel(value: Array, channels: int, rank: int) -> Array | None:
    """Return a constant as (channels,) float64, where it is one number a channel (or one for all); else None.

    `rank` counts an image's axes: 1 for (N, C), 3 for (N, C, H, W). Broadcasting is from the right, as in ONNX.
    """
    shape = (*[1] * (rank + 1 - value.ndim), *value.shape)
    if len(shape) > rank + 1 or any(side != 1 for axis, side in enumerate(shape) if axis != 1):
        return None
    return np.broadcast_to(value.reshape(shape)[0].reshape(-1), channels).astype(np.float64)


def where(node: onnx.NodeProto) -> str:
    """Return a node's own name, or its output's where it has none."""
    return str(node.name or node.output[0])


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values."""
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}
