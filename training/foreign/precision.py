"""Changes the floating-point type of a whole ONNX graph: float32 for serving, float64 as a measure."""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.artifact import stored_tensors

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})


def with_floats(model: onnx.ModelProto, element_type: int) -> onnx.ModelProto:
    """Return a copy in which every floating-point tensor, cast and declared value is of `element_type`.

    Widening is exact. What else a node holds, integer tensors and plain float attributes, stays.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in list(stored_tensors(changed)):
        if tensor.data_type in FLOATS - {element_type}:
            _convert(tensor, element_type)
    _convert_graph(changed.graph, element_type)
    for function in changed.functions:
        _convert_nodes(function.node, element_type)
    return changed


def _convert(tensor: TensorProto, element_type: int) -> None:
    values = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(element_type))
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def _convert_graph(graph: onnx.GraphProto, element_type: int) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in FLOATS:
            value.type.tensor_type.elem_type = element_type
    _convert_nodes(graph.node, element_type)


def _convert_nodes(nodes: Iterable[onnx.NodeProto], element_type: int) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "stash_type") and attribute.i in FLOATS:
                attribute.i = element_type
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _convert_graph(graph, element_type)
        if node.op_type == "Constant" and element_type != TensorProto.FLOAT:
            _spell_out(node, element_type)


def _spell_out(node: onnx.NodeProto, element_type: int) -> None:
    """A Constant's `value_float` is float32 whatever the graph; a tensor says its type."""
    for attribute in list(node.attribute):
        if attribute.name in ("value_float", "value_floats"):
            values = np.asarray(helper.get_attribute_value(attribute), helper.tensor_dtype_to_np_dtype(element_type))
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(values)))
