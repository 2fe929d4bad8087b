"""A folded float ONNX classifier → a Network. What has no exact form is refused by the node's name."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import shape_inference

from service.integers.tables import FUNCTIONS
from training.errors import NotConvertible
from training.exact.network import Conv, Function, Layer, Linear, Move, Network, Pair
from training.exact.nodes import (
    attributes,
    count_readers,
    known_shapes,
    live_nodes,
    per_channel,
    stored_constants,
    where,
)
from training.exact.normalizing import read_normalization
from training.exact.pooling import average_pool, largest_of_all, max_pool
from training.exact.tidying import begin_with_convolution, merge_clips

Array = NDArray[Any]
MOVES = frozenset({"Concat", "Flatten", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
ALIASES = frozenset({"Identity", "Dropout"})
# What divides by a sum over the image itself, which no table of one tensor can hold: transformers, ConvNeXt.
BY_THE_IMAGE = frozenset({
    "Attention", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization", "Softmax"
})  # fmt: skip


def read_network(model: onnx.ModelProto) -> Network:
    """Return the layers of a folded artifact: uint8 `image` (N, H, W, C) in, float32 `logits` out.

    Raises NotConvertible with the first node that has no exact form.
    """
    return _Reader(model).read()


class _Reader:
    """Reads one graph in its own order; functions of one tensor stay open until something else reads them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = shape_inference.infer_shapes(model, data_prop=True).graph
        self.constants, nodes = stored_constants(graph)
        self.shapes = known_shapes(graph)
        self.logits = graph.output[0].name
        self.nodes = live_nodes(nodes, self.logits)
        self.readers = count_readers(self.nodes, self.logits)
        self.layers: list[Layer] = []
        self._alias: dict[str, str] = {}
        self._open: dict[str, tuple[str, tuple[onnx.NodeProto, ...]]] = {}  # functions: what of, and how
        size = graph.input[0].type.tensor_type.shape.dim[1:3]
        self._size = int(size[0].dim_value), int(size[1].dim_value)
        self._image_name = graph.input[0].name

    def read(self) -> Network:
        for node in self.nodes:  # before how the graph begins: networks with these begin with sizes, not with pixels
            if node.op_type in BY_THE_IMAGE:
                raise NotConvertible(f"node {where(node)} ({node.op_type}) has no exact form")
        start = read_normalization(self._image_name, self.nodes, self.constants, self.readers)
        for node in self.nodes[start.nodes :]:
            self._read_node(node)
        head = self._take_head()
        network = Network(start.tensor, start.scale, start.shift, self._size, self.layers, head, self.shapes)
        merge_clips(network)
        begin_with_convolution(network)
        return network

    def tensor(self, name: str) -> str:
        """Return the name of a tensor that exists, emitting the function that makes it where it is still open."""
        name = self._alias.get(name, name)
        if name in self._open:
            base, nodes = self._open.pop(name)
            used = {one: self.constants[one] for node in nodes for one in node.input if one in self.constants}
            self.layers.append(Function(where(nodes[-1]), base, name, nodes, used))
        return name

    def inputs(self, node: onnx.NodeProto) -> list[str]:
        """Return the names of a node's inputs that are no constants."""
        return [self._alias.get(name, name) for name in node.input if name and name not in self.constants]

    def constant(self, node: onnx.NodeProto, position: int) -> Array:
        """Return a constant input. Raises NotConvertible where it is none."""
        name = node.input[position] if position < len(node.input) else ""
        if name not in self.constants:
            raise NotConvertible(f"node {where(node)} ({node.op_type}): its input {position} is not a constant")
        return self.constants[name]

    def _read_node(self, node: onnx.NodeProto) -> None:
        operator = node.op_type
        if operator in ALIASES:
            self._alias[node.output[0]] = self._alias.get(node.input[0], node.input[0])
        elif operator in _READERS:
            _READERS[operator](self, node)
        elif self._is_function(node):
            self._extend_function(node)
        elif operator in ("Add", "Sub", "Mul", "Div", "BatchNormalization"):
            self._read_arithmetic(node)
        elif operator in MOVES:
            self._read_move(node)
        else:
            raise NotConvertible(f"node {where(node)} ({operator}) has no exact form")

    def _is_function(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in FUNCTIONS or node.domain:
            return False
        bases = {self._base(name) for name in self.inputs(node)}
        scalars = all(self.constants[name].size == 1 for name in node.input if name in self.constants)
        return len(bases) == 1 and scalars

    def _base(self, name: str) -> str:
        return self._open[name][0] if name in self._open else name

    def _extend_function(self, node: onnx.NodeProto) -> None:
        names = self.inputs(node)
        nodes: dict[int, onnx.NodeProto] = {}
        for name in names:
            nodes |= {id(one): one for one in self._open.get(name, ("", ()))[1]}
        own = copy.deepcopy(node)
        for place, name in enumerate(own.input):
            own.input[place] = self._alias.get(name, name)
        self._open[node.output[0]] = (self._base(names[0]), (*nodes.values(), own))

    def _read_arithmetic(self, node: onnx.NodeProto) -> None:
        if len(self.inputs(node)) == 1:
            self._read_affine(node)
        elif node.op_type in ("Add", "Mul"):
            a, b = sorted((self.tensor(name) for name in self.inputs(node)), key=self._elements, reverse=True)
            self.layers.append(Pair(where(node), node.op_type, a, b, node.output[0]))
        else:
            raise NotConvertible(f"node {where(node)} ({node.op_type}): two tensors are added or multiplied, no more")

    def _elements(self, name: str) -> int:
        return math.prod(self.shapes.get(name, (1,)))

    def _read_affine(self, node: onnx.NodeProto) -> None:
        """Read x·scale + shift per channel: into the layer before it where nothing else reads that, else as its own."""
        source = self.tensor(self.inputs(node)[0])
        channels = self.shapes[source][0]
        scale, shift = self._affine(node, channels, len(self.shapes[source]))
        last = self.layers[-1] if self.layers else None
        if isinstance(last, Conv | Linear) and last.y == source and self.readers[source] == 1:
            last.weight = last.weight * scale.reshape(-1, *[1] * (last.weight.ndim - 1))
            last.bias, last.y = last.bias * scale + shift, node.output[0]
            return
        spatial = len(self.shapes[source]) - 1
        if spatial < 1:
            raise NotConvertible(f"node {where(node)} ({node.op_type}): a multiply-add on vectors has no exact form")
        weight = scale.reshape(-1, 1, *[1] * spatial)
        ones, none = (1,) * spatial, (0,) * 2 * spatial
        self.layers.append(Conv(where(node), source, node.output[0], weight, shift, ones, none, ones, channels))

    def _affine(self, node: onnx.NodeProto, channels: int, rank: int) -> tuple[Array, Array]:
        if node.op_type == "BatchNormalization":
            gamma, beta, mean, var = (self.constant(node, place).astype(np.float64) for place in (1, 2, 3, 4))
            scale = gamma / np.sqrt(var + attributes(node).get("epsilon", 1e-5))
            return scale, beta - mean * scale
        place = next(at for at, name in enumerate(node.input) if name in self.constants)
        value = per_channel(self.constants[node.input[place]], channels, rank)
        if value is None or (place == 0 and node.op_type in ("Sub", "Div")):
            raise NotConvertible(f"node {where(node)} ({node.op_type}): its constant is not one number a channel")
        one, zero = np.ones(channels), np.zeros(channels)
        forms = {"Add": (one, value), "Sub": (one, -value), "Mul": (value, zero)}
        return forms[node.op_type] if node.op_type in forms else (1 / value, zero)

    def _read_move(self, node: onnx.NodeProto) -> None:
        moved = copy.deepcopy(node)
        held = {place: self.constants[name] for place, name in enumerate(node.input) if name in self.constants}
        if node.op_type == "Reshape":
            held[1] = np.array([-1, *self._known(node)], np.int64)
        elif any(place and name and name not in self.constants for place, name in enumerate(node.input)) and (
            node.op_type != "Concat"
        ):
            raise NotConvertible(f"node {where(node)} ({node.op_type}): where it moves to hangs on the images")
        _check_move(node, self.constants)
        names = list(node.input) if node.op_type == "Concat" else [node.input[0]]
        tensors = tuple(self.tensor(name) for name in names)
        self.layers.append(Move(where(node), tensors, tuple(node.output), moved, held))

    def _known(self, node: onnx.NodeProto) -> tuple[int, ...]:
        shape = self.shapes.get(node.output[0])
        if shape is None:
            raise NotConvertible(f"node {where(node)} ({node.op_type}): its shape cannot be told from the file")
        return shape

    def _take_head(self) -> Linear:
        name = self._alias.get(self.logits, self.logits)
        last = self.layers[-1] if self.layers else None
        if name in self._open or not isinstance(last, Linear) or last.y != name:
            raise NotConvertible("the logits do not come straight from a linear layer, so they have no exact form")
        self.layers.pop()
        return last


def _check_move(node: onnx.NodeProto, constants: Mapping[str, Array]) -> None:
    if attributes(node).get("mode", b"constant") != b"constant":
        raise NotConvertible(f"node {where(node)} ({node.op_type}): it pads with the image's own values")
    if node.op_type == "Concat" and any(name in constants for name in node.input):
        raise NotConvertible(f"node {where(node)} (Concat): it joins a constant to what hangs on the images")


def _read_conv(reader: _Reader, node: onnx.NodeProto) -> None:
    weight = reader.constant(node, 1).astype(np.float64)
    bias = reader.constant(node, 2).astype(np.float64) if len(node.input) > 2 else np.zeros(len(weight))
    given, spatial = attributes(node), weight.ndim - 2
    if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise NotConvertible(
            f"node {where(node)} (Conv): its padding is not written out ({given['auto_pad'].decode()})"
        )
    reader.layers.append(
        Conv(
            where(node),
            reader.tensor(node.input[0]),
            node.output[0],
            weight,
            bias,
            tuple(given.get("strides", [1] * spatial)),
            tuple(given.get("pads", [0] * 2 * spatial)),
            tuple(given.get("dilations", [1] * spatial)),
            given.get("group", 1),
        )
    )


def _read_gemm(reader: _Reader, node: onnx.NodeProto) -> None:
    given = attributes(node)
    weight = reader.constant(node, 1).astype(np.float64) * given.get("alpha", 1.0)
    if given.get("transA"):
        raise NotConvertible(f"node {where(node)} (Gemm): it transposes its images")
    weight = weight if given.get("transB") else weight.T
    bias = np.zeros(len(weight))
    if len(node.input) > 2:
        bias = np.broadcast_to(reader.constant(node, 2), (1, len(weight)))[0] * float(given.get("beta", 1.0))
    reader.layers.append(Linear(where(node), reader.tensor(node.input[0]), node.output[0], weight, bias.astype(float)))


def _read_matmul(reader: _Reader, node: onnx.NodeProto) -> None:
    weight = reader.constant(node, 1).astype(np.float64)
    source = reader.tensor(node.input[0])
    if weight.ndim != 2 or len(reader.shapes.get(source, ())) != 1:
        raise NotConvertible(f"node {where(node)} (MatMul): not a linear layer on one vector an image")
    reader.layers.append(Linear(where(node), source, node.output[0], weight.T, np.zeros(weight.shape[1])))


def _read_max_pool(reader: _Reader, node: onnx.NodeProto) -> None:
    source = reader.tensor(node.input[0])
    reader.layers.append(max_pool(node, source, reader.shapes[source], reader.shapes[node.output[0]]))


def _read_average_pool(reader: _Reader, node: onnx.NodeProto) -> None:
    source = reader.tensor(node.input[0])
    reader.layers += average_pool(node, source, reader.shapes[source], _reduced(reader, node))


def _read_largest(reader: _Reader, node: onnx.NodeProto) -> None:
    source = reader.tensor(node.input[0])
    reader.layers += largest_of_all(node, source, reader.shapes[source], _reduced(reader, node))


def _reduced(reader: _Reader, node: onnx.NodeProto) -> Array | None:
    """Return the axes that a reduction takes as an input."""
    return reader.constants.get(node.input[1]) if len(node.input) > 1 else None


_READERS: dict[str, Callable[[_Reader, onnx.NodeProto], None]] = {
    "Conv": _read_conv,
    "Gemm": _read_gemm,
    "MatMul": _read_matmul,
    "MaxPool": _read_max_pool,
    "AveragePool": _read_average_pool,
    "GlobalAveragePool": _read_average_pool,
    "GlobalMaxPool": _read_largest,
    "ReduceMax": _read_largest,
    "ReduceMean": _read_average_pool,
}
