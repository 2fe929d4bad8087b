"""What is constant in an ONNX graph: initializers, Constant nodes, and arithmetic on those alone."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
# What exporters leave between a stored weight and its use: layout, types, and a BatchNorm written out in arithmetic.
COMPUTED = frozenset({
    "Identity", "Cast", "CastLike", "Shape", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "Concat",
    "Expand", "Sqrt", "Reciprocal", "Neg", "Pow", "Add", "Sub", "Mul", "Div",
})  # fmt: skip
LARGEST = 2**28  # bytes that may be computed beside what the stored weights explain
STEPS = 8  # values of its own size that a weight may pass through: standardising takes six
WIDEST = 8  # bytes of a number; what is computed here is float64 or int64
FEW = 1024  # numbers that may be a shape, axes or a scale


def room_for(graph: GraphProto) -> int:
    """Return the bytes that may be computed from a graph's weights, in all: a few bytes can ask for any number."""
    written_out = (entry.t for node in graph.node if node.op_type == "Constant" for entry in node.attribute)
    return LARGEST + STEPS * sum(map(_stored, (*graph.initializer, *written_out)))


def _stored(tensor: TensorProto) -> int:
    """Return the bytes that a tensor really has, whatever its shape says; a number outside raw_data counts as 8."""
    typed = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    return len(tensor.raw_data) + WIDEST * sum(map(len, typed))


def opset_of(model: ModelProto) -> int:
    """Return the version of ONNX's own operators that the file imports, 0 for none."""
    return max((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), default=0)


class Constants:
    """The constants that the nodes of one graph can see, its own and those of the graphs around it."""

    def __init__(self, graph: GraphProto, opset: int, given: frozenset[str], outer: "Constants | None" = None) -> None:
        """`given` are the names that a caller may set, whatever the file stores for them."""
        self._opset = opset
        self._outer = outer
        self._graph = graph
        self._room: int | None = None  # bytes that may still be computed; counted where something is
        self._tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in given}
        self._nodes: dict[str, NodeProto] = {}
        self._known: dict[str, NDArray[Any] | None] = {}
        for node in graph.node:
            if node.op_type == "Constant" or (
                node.op_type in COMPUTED and node.domain in {"", "ai.onnx"} and all(map(self.has, _numbers(node)))
            ):
                self._nodes |= dict.fromkeys(node.output, node)

    @classmethod
    def of(cls, model: ModelProto) -> "Constants":
        """Return those of the main graph. A default that a caller may replace counts, as runtimes fold it."""
        return cls(model.graph, opset_of(model), frozenset())

    def has(self, name: str) -> bool:
        """Whether `name` is constant; an input left out counts as one."""
        here = not name or name in self._tensors or name in self._nodes
        return here or (self._outer is not None and self._outer.has(name))

    def tensor(self, name: str) -> TensorProto | None:
        """Return the initializer of this very graph, None where `name` is something else."""
        return self._tensors.get(name)

    def array(self, name: str) -> NDArray[Any] | None:
        """Return the value, numbers with a fraction in float64; None for what is not constant, or not readable."""
        waiting = [name]
        while waiting:  # not by calling itself: a file may hold chains longer than Python's stack
            needs = self._needs(waiting[-1])
            waiting += needs
            if not needs:
                last = waiting.pop()
                if last not in self._known:
                    self._known[last] = self._read(last)
        return self._known[name]

    def _needs(self, name: str) -> list[str]:
        """Return what must be known before `name` can be."""
        if name in self._known or name not in self._nodes:
            return []
        return [one for one in _numbers(self._nodes[name]) if one and one not in self._known]

    def floats(self, name: str) -> NDArray[np.float64] | None:
        """Return the value where it holds numbers with a fraction."""
        values = self.array(name)
        return values if values is not None and values.dtype == np.float64 else None

    def integers(self, name: str) -> list[int] | None:
        """Return the value as a flat list where it holds integers."""
        values = self.array(name)
        return None if values is None or values.dtype.kind not in "iu" else [int(value) for value in values.ravel()]

    def _read(self, name: str) -> NDArray[Any] | None:
        if name in self._tensors:
            return _to_array(self._tensors[name])
        if name in self._nodes:
            return self._compute(self._nodes[name])
        return None if self._outer is None else self._outer.array(name)

    def _compute(self, node: NodeProto) -> NDArray[Any] | None:
        if node.op_type == "Constant":
            return _constant_node(node)
        wanted = {name for name in _numbers(node) if name}
        inputs = {name: values for name in wanted if (values := self.array(name)) is not None}
        if len(inputs) < len(wanted):
            return None
        first = self.floats(node.input[0])
        to_float = node.op_type == "CastLike" or (node.op_type == "Cast" and _attribute(node, "to") in FLOATS)
        if to_float and first is not None:
            return first
        if node.op_type == "CastLike":
            return None  # to a type that only the other input tells
        return _evaluate(node, inputs, self._opset) if self._has_room(_size(node, inputs, self._opset)) else None

    def _has_room(self, size: float) -> bool:
        """Whether so many bytes may be computed; they count from then on."""
        if self._room is None:
            self._room = room_for(self._graph)
        if size > self._room:
            return False
        self._room -= int(size)
        return True


def _numbers(node: NodeProto) -> list[str]:
    """Return the inputs whose numbers a node reads; of the second of CastLike it reads the type alone."""
    return list(node.input[:1] if node.op_type == "CastLike" else node.input)


def _attribute(node: NodeProto, name: str) -> Any:
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), None)


def _to_array(tensor: TensorProto) -> NDArray[Any] | None:
    if tensor.data_location == TensorProto.EXTERNAL:
        return None
    values = numpy_helper.to_array(tensor)
    return values.astype(np.float64) if tensor.data_type in FLOATS else values


def _constant_node(node: NodeProto) -> NDArray[Any] | None:
    value = helper.get_attribute_value(node.attribute[0]) if node.attribute else None
    if isinstance(value, TensorProto):
        return _to_array(value)
    if isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float)):
        return np.asarray(value, np.float64)
    integer = isinstance(value, int) or (isinstance(value, list) and all(isinstance(one, int) for one in value))
    return np.asarray(value, np.int64) if integer else None


def _evaluate(node: NodeProto, inputs: Mapping[str, Any], opset: int) -> NDArray[Any] | None:
    """Run one node by ONNX's own reference, on float64 whatever the file's type is."""
    model = _alone(node, inputs, opset)
    try:
        with np.errstate(all="ignore"):
            first, *_ = ReferenceEvaluator(model).run(None, dict(inputs))
            values = np.asarray(first)
    except Exception:  # noqa: BLE001 - the reference raises whatever NumPy does; then it is not taken for a constant
        return None
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def _size(node: NodeProto, inputs: Mapping[str, NDArray[Any]], opset: int) -> float:
    """Return the bytes of what one node would give, by ONNX's shape inference; infinity where that cannot tell."""
    model = _alone(node, inputs, opset)
    small = {name: values for name, values in inputs.items() if values.size <= FEW}
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in small.items())
    try:
        output = shape_inference.infer_shapes(model).graph.output[0].type.tensor_type
    except Exception:  # noqa: BLE001 - ONNX raises types of its own
        return math.inf
    if not output.HasField("shape") or not all(dim.HasField("dim_value") for dim in output.shape.dim):
        return math.inf
    return float(WIDEST * math.prod(int(dim.dim_value) for dim in output.shape.dim))


def _alone(node: NodeProto, inputs: Mapping[str, NDArray[Any]], opset: int) -> ModelProto:
    """Return a model of one node, whose inputs have the types and shapes of the values given."""
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape)
        for name, values in inputs.items()
    ]
    graph = helper.make_graph([node], "constant", infos, [ValueInfoProto(name=node.output[0])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def names_read_inside(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """Yield every name that graphs inside these nodes read, their own among them."""
    for graph in graphs_inside(nodes):
        yield from (output.name for output in graph.output)
        for node in graph.node:
            yield from node.input
        yield from names_read_inside(graph.node)


def graphs_inside(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """Yield the graphs that these nodes hold: branches and loop bodies, one level deep."""
    for attribute in (entry for node in nodes for entry in node.attribute):
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g
