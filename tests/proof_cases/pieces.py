"""Pieces from which random graphs are built: each takes [N, channels, 4, 4] and gives the same back.

KEEPING pieces keep images apart by construction, in forms that exporters write; MIXING pieces let something
of the batch through. A piece adds nodes to a Builder and returns the name of its result.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 4
IR_VERSION = 8


@dataclass(slots=True)
class Builder:
    """A graph in the making, at one opset; weights come from its own generator."""

    opset: int
    channels: int
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    made: int = 0

    def name(self) -> str:
        """A name nobody has yet."""
        self.made += 1
        return f"t{self.made}"

    def add(self, operator: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; return the name of its output, or their names where there are several."""
        names = [self.name() for _ in range(outputs)]
        node = helper.make_node(operator, inputs, names, f"node_{names[0]}", domain=domain, **attributes)
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Add an initializer."""
        name = self.name()
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def ints(self, *values: int) -> str:
        """Add an initializer of int64 values."""
        return self.constant(values, np.int64)

    def normal(self, *shape: int) -> str:
        """Add random weights of about unit gain."""
        fan_in = int(np.prod(shape[1:])) or 1
        return self.constant(self.rng.standard_normal(shape) / np.sqrt(fan_in))

    def reduce(self, kind: str, x: str, axes: list[int] | None, keepdims: int = 1) -> str:
        """A reduction with its axes where this opset wants them."""
        if axes is None:
            return str(self.add(f"Reduce{kind}", x, keepdims=keepdims))
        if self.opset >= 18 or (kind == "Sum" and self.opset >= 13):
            return str(self.add(f"Reduce{kind}", x, self.ints(*axes), keepdims=keepdims))
        return str(self.add(f"Reduce{kind}", x, axes=axes, keepdims=keepdims))

    def unsqueeze(self, x: str, *axes: int) -> str:
        """Unsqueeze in this opset's form."""
        if self.opset >= 13:
            return str(self.add("Unsqueeze", x, self.ints(*axes)))
        return str(self.add("Unsqueeze", x, axes=list(axes)))

    def slice(self, x: str, axis: int, start: int, end: int, step: int = 1) -> str:
        """A Slice along one axis."""
        return str(self.add("Slice", x, *(self.ints(value) for value in (start, end, axis, step))))

    def batch_size(self, x: str) -> str:
        """N as a scalar, from the shape."""
        return str(self.add("Gather", self.add("Shape", x), self.constant(0, np.int64), axis=0))

    def reshape(self, x: str, *target: int) -> str:
        """A Reshape to a constant target."""
        return str(self.add("Reshape", x, self.ints(*target)))

    def swap(self, x: str) -> str:
        """Batch and channels exchanged."""
        return str(self.add("Transpose", x, perm=[1, 0, 2, 3]))

    def blend(self, x: str, other: str) -> str:
        """X plus a tenth of something that broadcasts to it, so that values stay of one size."""
        return str(self.add("Add", x, self.add("Mul", other, self.constant(0.1))))

    def model(self, output: str) -> onnx.ModelProto:
        """The finished model."""
        shape = ["N", self.channels, SIDE, SIDE]
        images = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "random", [images], [result], self.constants)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("local", 1)]
        return helper.make_model(graph, opset_imports=imports, functions=self.functions, ir_version=IR_VERSION)


Piece = Callable[[Builder, str], str]


def branch(name: str, operator: str, x: str, **attributes: Any) -> onnx.GraphProto:
    """A nested graph of one node on a tensor of the graph around it."""
    node = helper.make_node(operator, [x], [name], **attributes)
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])
