"""Operators on constants alone: what they compute is the same for every batch; only shapes and sizes matter.

Values are computed, by ONNX's reference evaluator, where a size may depend on them: small results of
operators that are exact. Everything else keeps its shape, where ONNX's shape inference knows it.
"""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from service.independence.proof.call import Call
from service.independence.proof.extents import Dim, product
from service.independence.proof.refusals import Unproven
from service.independence.proof.values import Fixed, as_fixed, constant
from service.reference import evaluator_of

if TYPE_CHECKING:
    from onnx.reference import ReferenceEvaluator

MOST_ELEMENTS = 4096
"""More than any shape arithmetic needs, few enough that a hostile file cannot make the proof slow."""

EXACT = frozenset((
    "Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Flatten",
    "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod",
    "Mul", "Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape",
    "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where",
))  # fmt: skip
"""Operators whose results every kernel and the reference evaluator agree on, to the last bit."""
NESTED = frozenset(("If", "Loop", "Scan", "SequenceMap"))
READ_TYPES = frozenset((
    "FLOAT", "DOUBLE", "BOOL", "INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64",
))  # fmt: skip


def from_tensor(tensor: onnx.TensorProto) -> Fixed:
    """A tensor of the file; its value is read only where it is small and inside the file."""
    shape = tuple(tensor.dims)
    if tensor.data_location == TensorProto.EXTERNAL or not _is_readable(tensor):
        return Fixed(shape, None, tensor.data_type)
    try:
        return Fixed(shape, numpy_helper.to_array(tensor), tensor.data_type)
    except ValueError as error:
        raise Unproven(f"holds the damaged tensor {tensor.name!r}", "check the file with onnx.checker") from error


def _is_readable(tensor: onnx.TensorProto) -> bool:
    known = tensor.data_type in TensorProto.DataType.values()
    return known and TensorProto.DataType.Name(tensor.data_type) in READ_TYPES and _is_small(tuple(tensor.dims))


def _constant_node(call: Call) -> Fixed:
    ((name, value),) = call.attributes.items()
    if isinstance(value, onnx.TensorProto):
        return from_tensor(value)
    if isinstance(value, onnx.SparseTensorProto):
        return Fixed(tuple(value.dims), None, value.values.data_type)
    if name.startswith("value_string"):
        return Fixed(None)
    return constant(np.asarray(value, dtype=np.float32 if "float" in name else np.int64))


def of_constants(call: Call, *, has_rule: bool) -> tuple[Fixed, ...]:
    """The results of an operator on fixed inputs; it must be known to depend on nothing else."""
    if call.operator == "Constant":
        return (_constant_node(call),)
    if not _is_standard(call):
        if not has_rule:
            raise Unproven(f"cannot be followed: no rule for op {call.operator}")
        return tuple(Fixed(None) for _ in call.node.output)
    inputs = [None if value is None else as_fixed(value) for value in call.inputs]
    outputs = _inferred(call, inputs)
    small = all(_is_small(output.shape) for output in outputs)
    known = all(value is None or value.value is not None for value in inputs)
    if call.operator in EXACT and small and known and not _may_differ(call, inputs):
        return tuple(constant(value) for value in _evaluate(call, inputs))
    return outputs


def _is_small(shape: tuple[Dim, ...] | None) -> bool:
    count = None if shape is None else product(shape)
    return count is not None and count <= MOST_ELEMENTS


def _is_standard(call: Call) -> bool:
    """Whether ONNX defines the operator at this opset, as a function of its inputs alone."""
    if call.node.domain not in ("", "ai.onnx") or call.operator in NESTED:
        return False
    return onnx.defs.has(call.operator, max_inclusive_version=call.opset, domain="")


def _may_differ(call: Call, inputs: list[Fixed | None]) -> bool:
    """Whether a kernel may compute another value than the reference evaluator.

    That rounds negative quotients of integers down where kernels round towards zero, and sums and products of
    fractions depend on the order.
    """
    values = [value.value for value in inputs if value is not None and value.value is not None]
    if call.operator in ("Div", "Mod"):
        return any(bool((value < 0).any()) for value in values)
    return call.operator in ("ReduceSum", "ReduceProd") and any(value.dtype.kind == "f" for value in values)


def _node(call: Call, inputs: list[Fixed | None]) -> onnx.NodeProto:
    names = ["" if value is None else f"i{index}" for index, value in enumerate(inputs)]
    outputs = [f"o{index}" for index in range(len(call.node.output))]
    return helper.make_node(call.operator, names, outputs, **call.attributes)


def _inferred(call: Call, inputs: list[Fixed | None]) -> tuple[Fixed, ...]:
    node = _node(call, inputs)
    types, data = {}, {}
    for index, value in enumerate(inputs):
        if value is not None:
            types[f"i{index}"] = helper.make_tensor_type_proto(value.element_type, value.shape)
            if value.value is not None:
                data[f"i{index}"] = numpy_helper.from_array(value.value)
    schema = onnx.defs.get_schema(call.operator, call.opset, "")
    opsets = [helper.make_opsetid("", call.opset)]
    try:
        found = shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=opsets)
    except (RuntimeError, ValueError, onnx.checker.ValidationError, shape_inference.InferenceError):
        found = {}  # then nothing is known of the shape, and whoever needs it refuses
    return tuple(_of_type(found.get(name)) for name in node.output)


def _of_type(found: onnx.TypeProto | None) -> Fixed:
    if found is None or not found.HasField("tensor_type"):
        return Fixed(None)
    tensor = found.tensor_type
    if not tensor.HasField("shape"):
        return Fixed(None, None, tensor.elem_type)
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    return Fixed(dims, None, tensor.elem_type)


def _evaluate(call: Call, inputs: list[Fixed | None]) -> list[np.ndarray[Any, Any]]:
    node = _node(call, inputs)
    feeds = {f"i{index}": value.value for index, value in enumerate(inputs) if value is not None}
    evaluator = _evaluator(node.SerializeToString(deterministic=True), call.opset)
    with np.errstate(all="ignore"):
        return [np.asarray(value) for value in evaluator.run(None, feeds, attributes={})]


@functools.lru_cache(maxsize=256)
def _evaluator(node_bytes: bytes, opset: int) -> "ReferenceEvaluator":
    node = onnx.NodeProto.FromString(node_bytes)
    opsets = [helper.make_opsetid("", opset)]
    function = helper.make_function("fold", "f", [n for n in node.input if n], list(node.output), [node], opsets)
    return evaluator_of(function)
