"""Small ONNX graphs with BatchNorm, drawn node by node."""

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper, shape_inference

Array = NDArray[np.float64]
FLOATS = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


class Sketch:
    """An ONNX graph in the making; every method adds a node and returns the name of its output."""

    def __init__(self, channels: int = 4, *, size: tuple[int, ...] = (8, 8), seed: int = 0, opset: int = 17) -> None:
        """The input `images` is (batch, channels, *size)."""
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.shape = (channels, *size)
        self.nodes: list[object] = []
        self.constants: dict[str, NDArray[np.generic]] = {}
        self.channels = {"images": channels}
        self.dtype: type[np.floating] = np.float32
        self.dims = len(size)

    def constant(self, values: object, name: str = "") -> str:
        """Store a constant; floats become the type of the graph at the end."""
        name = name or f"c{len(self.constants)}"
        self.constants[name] = np.asarray(values)
        return name

    def node(self, kind: str, *inputs: str, channels: int | None = None, **attributes: object) -> str:
        """Add a node; `channels` of its output are those of its first input unless given."""
        output = f"{kind.lower()}{len(self.nodes)}_out"
        self.nodes.append(
            helper.make_node(kind, list(inputs), [output], f"{kind.lower()}{len(self.nodes)}", **attributes)
        )
        self.channels[output] = self.channels.get(inputs[0], 0) if channels is None else channels
        return output

    def conv(
        self,
        x: str,
        outputs: int = 6,
        kernel: int = 3,
        groups: int = 1,
        *,
        bias: bool = True,
        transposed: bool = False,
        weight: str = "",
        **attributes: object,
    ) -> str:
        """Add a convolution with random weights, or with those stored as `weight`."""
        inputs = self.channels[x]
        shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
        weights = [weight or self.constant(self.rng.standard_normal((*shape, *[kernel] * self.dims)))]
        weights += [self.constant(self.rng.standard_normal(outputs))] if bias else []
        kind = "ConvTranspose" if transposed else "Conv"
        return self.node(kind, x, *weights, channels=outputs, group=groups, **attributes)

    def norm(
        self,
        x: str,
        *,
        positive: bool = False,
        shift: bool = True,
        beta: str = "",
        eps: float = 1e-3,
        **attributes: object,
    ) -> str:
        """Add a BatchNormalization with a past; without `shift` its t is 0."""
        count = self.channels[x]
        gamma, bias, mean = self.rng.standard_normal((3, count)) * 2
        gamma, variance = np.abs(gamma) + 0.1 if positive else gamma, self.rng.random(count) * 3 + 0.1
        mean, bias = (mean, bias) if shift else (np.zeros(count), np.zeros(count))
        names = [self.constant(gamma), beta or self.constant(bias), self.constant(mean), self.constant(variance)]
        return self.node("BatchNormalization", x, *names, epsilon=eps, **attributes)

    def gemm(self, x: str, inputs: int, outputs: int = 5, *, bias: bool = True, **attributes: object) -> str:
        """Add a Gemm with transB=1."""
        weights = [self.constant(self.rng.standard_normal((outputs, inputs)))]
        weights += [self.constant(self.rng.standard_normal(outputs))] if bias else []
        return self.node("Gemm", x, *weights, channels=outputs, transB=1, **attributes)

    def arithmetic(self, kind: str, x: str, values: Array | float) -> str:
        """Add x ∘ values, given for each channel or for all."""
        shape = (-1, *[1] * self.dims) if np.ndim(values) else ()
        return self.node(kind, x, self.constant(np.reshape(values, shape)))

    def model(self, *outputs: str, half: bool = False) -> ModelProto:
        """Return the model; `half` stores its numbers in float16."""
        dtype = np.float16 if half else self.dtype
        stored = {
            name: values.astype(dtype) if values.dtype == np.float64 else values
            for name, values in self.constants.items()
        }
        graph = helper.make_graph(
            self.nodes,
            "pattern",
            [helper.make_tensor_value_info("images", FLOATS[dtype], ["batch", *self.shape])],
            [helper.make_tensor_value_info(output, FLOATS[dtype], None) for output in outputs],
            [numpy_helper.from_array(values, name) for name, values in stored.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        shaped = shape_inference.infer_shapes(model).graph.output
        del model.graph.output[:]
        model.graph.output.extend(shaped)
        return model
