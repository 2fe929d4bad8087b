"""An ONNX file → its steps. Every node must have a part in one, or the file is refused."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from service.errors import NotExact
from service.integers.steps import Convolution, Head, Move, Operand, Pair, Step, Steps
from service.integers.tables import read_table

Array = NDArray[Any]

MOVES = frozenset({
    "Clip", "Concat", "Flatten", "Identity", "MaxPool", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
})  # fmt: skip
PAIRS = frozenset({"Add", "Mul"})


def read_steps(model: onnx.ModelProto) -> Steps:
    """Return the steps of an exact model. Raises NotExact with the first node that is not in the grammar."""
    return _Reader(model).read()


def constants_of(graph: onnx.GraphProto) -> dict[str, Array]:
    """Return the arrays that a graph stores, by name."""
    return {one.name: numpy_helper.to_array(one) for one in graph.initializer}


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values."""
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


class _Reader:
    """Reads one file, node by node in the file's order, which ONNX fixes to be a possible order of running."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._constants = constants_of(model.graph)
        self._makers = {output: node for node in model.graph.node for output in node.output}
        self._integer = {value.name for value in model.graph.input}  # tensors that are uint8
        self._open: dict[str, onnx.NodeProto] = {}  # nodes read whose step is not complete, by output

    def read(self) -> Steps:
        graph = self._model.graph
        if len(graph.input) != 1 or len(graph.output) != 1:
            raise NotExact("an exact model has one input and one output")
        if self._model.functions or len({(one.domain, one.version) for one in self._model.opset_import}) != 1:
            raise NotExact("an exact model uses the standard ONNX operators alone")
        logits = graph.output[0].name
        steps = [step for node in graph.node for step in self._read_node(node, logits)]
        if self._open or not steps or not isinstance(steps[-1], Head):
            left = next(iter(self._open.values()), graph.node[-1] if graph.node else None)
            raise NotExact(f"{_where(left)}: it is not part of any exact step")
        return Steps(tuple(steps), graph.input[0].name, logits)

    def _read_node(self, node: onnx.NodeProto, logits: str) -> list[Step]:
        if node.domain:
            raise NotExact(f"{_where(node)}: it belongs to the domain {node.domain}")
        if node.op_type == "QLinearConv":
            return [self._done(self._convolution(node), node)]
        if node.op_type == "QuantizeLinear":
            return [self._done(self._island(node), node)]
        if node.op_type == "Mul" and node.output[0] == logits:
            return [self._head(node)]
        if node.op_type in MOVES and node.input[0] in self._integer:
            return [self._done(self._move(node), node)]
        self._open[node.output[0]] = node
        return []

    def _done(self, step: Step, node: onnx.NodeProto) -> Step:
        self._integer.update(node.output)
        return step

    def _tensor(self, node: onnx.NodeProto, position: int) -> str:
        name: str = node.input[position]
        if name not in self._integer:
            raise NotExact(f"{_where(node)}: its input {name} is not one of bytes")
        return name

    def _constant(self, node: onnx.NodeProto, position: int) -> Array:
        name = node.input[position] if position < len(node.input) else ""
        if name not in self._constants:
            raise NotExact(f"{_where(node)}: its input {position} ({name or 'absent'}) is not a stored constant")
        return self._constants[name]

    def _typed(self, node: onnx.NodeProto, position: int, kind: type[np.generic]) -> Array:
        array = self._constant(node, position)
        if array.dtype != kind:
            raise NotExact(f"{_where(node)}: its input {position} is {array.dtype}, expected {np.dtype(kind)}")
        return array

    def _zero(self, node: onnx.NodeProto, position: int) -> int:
        array = self._typed(node, position, np.uint8)
        if array.size != 1:
            raise NotExact(f"{_where(node)}: a tensor has one zero point, not {array.size}")
        return int(array.reshape(()))

    def _scale(self, node: onnx.NodeProto, position: int) -> np.float32:
        array = self._typed(node, position, np.float32)
        if array.size != 1 or not np.isfinite(array).all() or not (array > 0).all():
            raise NotExact(f"{_where(node)}: its input {position} is not one positive scale")
        return np.float32(array.reshape(()))

    def _move(self, node: onnx.NodeProto) -> Move:
        tensors = tuple(name for name in node.input if name and name not in self._constants)
        if foreign := [name for name in tensors if name not in self._integer]:
            raise NotExact(f"{_where(node)}: its input {foreign[0]} is not one of bytes")
        _check_move(node)
        held = {place: self._constants[name] for place, name in enumerate(node.input) if name in self._constants}
        return Move(_name(node), node, tensors, tuple(node.output), held)

    def _convolution(self, node: onnx.NodeProto) -> Convolution:
        if self._scale(node, 1) != 1 or self._scale(node, 6) != 1:
            raise NotExact(f"{_where(node)}: the scales of its input and output are not 1, so that it rounds twice")
        weight, factor = self._typed(node, 3, np.int8), self._typed(node, 4, np.float32)
        if self._typed(node, 5, np.int8).any():
            raise NotExact(f"{_where(node)}: its weights have a zero point")
        filters = len(weight)
        bias = self._typed(node, 8, np.int32) if len(node.input) > 8 else np.zeros(filters, np.int32)
        if bias.shape != (filters,) or factor.shape != (filters,):
            raise NotExact(f"{_where(node)}: bias and factors are not one for each of {filters} output channels")
        given, spatial = attributes_of(node), weight.ndim - 2
        if given.get("auto_pad", b"NOTSET") != b"NOTSET":
            raise NotExact(f"{_where(node)}: its padding is not written out")
        return Convolution(
            name=_name(node),
            x=self._tensor(node, 0),
            y=node.output[0],
            weight=weight,
            bias=bias,
            factor=factor,
            x_zero=self._zero(node, 2),
            y_zero=self._zero(node, 7),
            strides=tuple(given.get("strides", [1] * spatial)),
            pads=tuple(given.get("pads", [0] * 2 * spatial)),
            dilations=tuple(given.get("dilations", [1] * spatial)),
            groups=given.get("group", 1),
        )

    def _island(self, last: onnx.NodeProto) -> Step:
        """Read what lies between DequantizeLinear and QuantizeLinear: a sum, a product, or a function of one tensor."""
        nodes = self._inside(last)
        leaves = [node for node in nodes if node.op_type == "DequantizeLinear"]
        inner = [node for node in nodes if node.op_type != "DequantizeLinear"]
        for node in nodes:
            del self._open[node.output[0]]
        y = self._operand(last, last.output[0])
        if len(leaves) == 1 and inner:
            x = self._operand(leaves[0], self._tensor(leaves[0], 0))
            ends = (leaves[0], last)
            return read_table(_name(last), leaves[0].output[0], x, inner, y, self._constants, self._opset(), ends)
        if len(leaves) == 2 and len(inner) == 1 and inner[0].op_type in PAIRS:
            order = [next(leaf for leaf in leaves if leaf.output[0] == name) for name in inner[0].input]
            a, b = (self._operand(leaf, self._tensor(leaf, 0)) for leaf in order)
            return Pair(_name(inner[0]), inner[0].op_type, a, b, y)
        raise NotExact(f"{_where(last)}: what it rounds is neither one sum, one product, nor a function of one tensor")

    def _inside(self, last: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the open nodes that `last` hangs on, in the file's order."""
        wanted, waiting = set(), [last.input[0]]
        while waiting:
            name = waiting.pop()
            if name in self._constants or name in wanted:
                continue
            if name not in self._open:
                raise NotExact(f"{_where(last)}: it rounds {name}, which is shared, or not in float32")
            wanted.add(name)
            node = self._open[name]
            waiting += [] if node.op_type == "DequantizeLinear" else [one for one in node.input if one]
        return [node for name, node in self._open.items() if name in wanted]

    def _operand(self, node: onnx.NodeProto, tensor: str) -> Operand:
        return Operand(tensor, float(self._scale(node, 1)), self._zero(node, 2))

    def _head(self, last: onnx.NodeProto) -> Head:
        """Read MatMulInteger → Add of a bias → Cast → Mul by one scale."""
        cast = self._behind(last, 0, "Cast")
        add = self._behind(cast, 0, "Add")
        product = self._behind(add, 0, "MatMulInteger")
        if attributes_of(cast)["to"] != onnx.TensorProto.FLOAT:
            raise NotExact(f"{_where(cast)}: the sums become float32, nothing else")
        if self._typed(product, 3, np.int8).any():  # written out, for unsigned weights need another one
            raise NotExact(f"{_where(product)}: its weights have a zero point")
        weight, bias = self._typed(product, 1, np.int8), self._typed(add, 1, np.int32)
        if weight.ndim != 2 or bias.shape != (weight.shape[1],):
            raise NotExact(f"{_where(product)}: expected weights (C, K) and a bias (K,)")
        zero = self._zero(product, 2) if len(product.input) > 2 and product.input[2] else 0
        x, scale = self._tensor(product, 0), self._scale(last, 1)
        return Head(_name(product), x, last.output[0], weight, bias, zero, scale)

    def _behind(self, node: onnx.NodeProto, position: int, operator: str) -> onnx.NodeProto:
        found = self._open.pop(node.input[position], None)
        if found is None or found.op_type != operator:
            raise NotExact(f"{_where(node)}: expected {operator} before it")
        return found

    def _opset(self) -> int:
        return int(self._model.opset_import[0].version)


def _check_move(node: onnx.NodeProto) -> None:
    """Refuse what a move may do beside moving: mirror edges, or leave its windows to the runtime's reading of them."""
    given = attributes_of(node)
    if given.get("mode", b"constant") != b"constant" or given.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise NotExact(f"{_where(node)}: its padding is not written out as a constant")
    if given.get("ceil_mode", 0) or (node.op_type == "MaxPool" and len(node.output) > 1):
        raise NotExact(f"{_where(node)}: ceil_mode and indices are not in the grammar of exact models")


def _name(node: onnx.NodeProto) -> str:
    name: str = node.name or node.output[0]
    return name


def _where(node: onnx.NodeProto | None) -> str:
    return "the graph" if node is None else f"node {_name(node)} ({node.op_type})"
