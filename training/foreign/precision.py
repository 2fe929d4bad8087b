"""Widens float16 and bfloat16 graphs to float32, the one type that the service computes in. Widening is exact."""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from service.artifact import stored_tensors

OTHER_FLOATS = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
FLOATS = OTHER_FLOATS | {TensorProto.FLOAT}


def in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every floating-point tensor, cast and declared value is float32; float64 is narrowed."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in list(stored_tensors(changed)):
        if tensor.data_type in OTHER_FLOATS:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    _convert_graph(changed.graph)
    for function in changed.functions:
        _convert_nodes(function.node)
    return changed


def _convert_graph(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in OTHER_FLOATS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    _convert_nodes(graph.node)


def _convert_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "stash_type") and attribute.i in OTHER_FLOATS:
                attribute.i = TensorProto.FLOAT
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _convert_graph(graph)
