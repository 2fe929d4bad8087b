"""A folded float ONNX classifier → a Network. What has no exact form is refused by the node's name."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

from service.integers.tables import FUNCTIONS
from training.errors import NotConvertible
from training.exact.network import Clipped, Conv, Function, Layer, Linear, Move, Network, Pair, inputs_of
from training.exact.normalizing import read_normalization
from training.exact.pooling import average_pool, max_pool

Array = NDArray[Any]
MOVES = frozenset({"Concat", "Flatten", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
ALIASES = frozenset({"Identity", "Dropout"})


def read_network(model: onnx.ModelProto) -> Network:
    """Return the layers of a folded artifact: uint8 `image` (N, H, W, C) in, float32 `logits` out.

    Raises NotConvertible with the first node that has no exact form.
    """
    return _Reader(model).read()


class _Reader:
    """Reads one graph in its own order; functions of one tensor stay open until something else reads them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = shape_inference.infer_shapes(model, data_prop=True).graph
        self.constants, nodes = _constants(graph)
        self.shapes = _shapes(graph)
        self.logits = graph.output[0].name
        self.nodes = _live(nodes, self.logits)
        self.readers = _count_readers(self.nodes, self.logits)
        self.layers: list[Layer] = []
        self._alias: dict[str, str] = {}
        self._open: dict[str, tuple[str, tuple[onnx.NodeProto, ...]]] = {}  # functions: what of, and how
        size = graph.input[0].type.tensor_type.shape.dim[1:3]
        self._size = int(size[0].dim_value), int(size[1].dim_value)
        self._image_name = graph.input[0].name

    def read(self) -> Network:
        start = read_normalization(self._image_name, self.nodes, self.constants, self.readers)
        for node in self.nodes[start.nodes :]:
            self._read_node(node)
        head = self._take_head()
        network = Network(start.tensor, start.scale, start.shift, self._size, self.layers, head, self.shapes)
        _merge_clips(network)
        _begin_with_convolution(network)
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
    axes = reader.constants.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
    reader.layers += average_pool(node, source, reader.shapes[source], axes)


_READERS: dict[str, Callable[[_Reader, onnx.NodeProto], None]] = {
    "Conv": _read_conv,
    "Gemm": _read_gemm,
    "MatMul": _read_matmul,
    "MaxPool": _read_max_pool,
    "AveragePool": _read_average_pool,
    "GlobalAveragePool": _read_average_pool,
    "ReduceMean": _read_average_pool,
}


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


def _merge_clips(network: Network) -> None:
    """Let the layer before a ReLU or Clip do the clipping, where nothing else reads what it clips."""
    readers, makers = network.readers(), network.makers()
    for layer in list(network.layers):
        limits = _limits(layer) if isinstance(layer, Function) else None
        maker = makers.get(layer.x) if isinstance(layer, Function) else None
        if limits is None or not isinstance(layer, Function) or not isinstance(maker, Clipped) or maker.low is not None:
            continue
        if maker.high is None and len(readers[layer.x]) == 1:
            (maker.low, maker.high), maker.y = limits, layer.y
            makers[layer.y] = maker
            network.layers.remove(layer)


def _begin_with_convolution(network: Network) -> None:
    """Put a convolution that changes nothing in front, where the pixels do not go into one convolution alone."""
    readers = network.readers().get(network.image, [])
    if len(readers) == 1 and isinstance(readers[0], Conv):
        return
    channels, y = len(network.scale), f"{network.image}/same"
    for layer in (*network.layers, network.head):
        if isinstance(layer, Move):
            layer.inputs = tuple(y if name == network.image else name for name in layer.inputs)
        elif isinstance(layer, Pair):
            layer.a, layer.b = (y if name == network.image else name for name in (layer.a, layer.b))
        elif layer.x == network.image:
            layer.x = y
    weight = np.ones((channels, 1, 1, 1))
    same = Conv(y, network.image, y, weight, np.zeros(channels), (1, 1), (0,) * 4, (1, 1), channels)
    network.layers.insert(0, same)


def _limits(function: Function) -> tuple[float | None, float | None] | None:
    """Return the limits of a function that only clips, else None."""
    (node, *more) = function.nodes
    if more or node.op_type not in ("Relu", "Clip"):
        return None
    if node.op_type == "Relu":
        return 0.0, None
    given = attributes(node)
    values = [function.constants.get(name) for name in node.input[1:]]
    low, high = ([None if value is None else float(value.reshape(())) for value in values] + [None, None])[:2]
    return low if low is not None else given.get("min"), high if high is not None else given.get("max")


def _constants(graph: onnx.GraphProto) -> tuple[dict[str, Array], list[onnx.NodeProto]]:
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


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape without the batch, where all of it is known."""
    shapes = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim[1:]
        if value.type.tensor_type.HasField("shape") and all(dim.dim_value > 0 for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _live(nodes: Iterable[onnx.NodeProto], logits: str) -> list[onnx.NodeProto]:
    """Return the nodes that the logits hang on, in order; what only computes a shape of a Reshape is not among them."""
    wanted, live = {logits}, []
    for node in reversed(list(nodes)):
        if wanted & set(node.output):
            live.append(node)
            wanted.update(node.input[:1] if node.op_type == "Reshape" else node.input)
    return live[::-1]


def _count_readers(nodes: Iterable[onnx.NodeProto], logits: str) -> dict[str, int]:
    counts = {logits: 1}
    for node in nodes:
        for name in set(node.input):
            counts[name] = counts.get(name, 0) + 1
    return counts


__all__ = ["inputs_of", "read_network"]
