"""Small ONNX graphs with BatchNorm: what folds, what must stay, and each wrong fold that was published.

`PATTERNS` are what `benchmarks/folding.py` gives to every tool and what the tests hold foldserve to.
"""

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Pattern:
    """One graph: what it shows, where it was seen go wrong, and whether it can be folded."""

    name: str
    folds: bool
    build: Callable[[], ModelProto]
    seen: str = ""


def _after(kind: str = "Conv", **options: object) -> ModelProto:
    s = Sketch(size=options.pop("size", (8, 8)))  # type: ignore[arg-type]
    x = s.conv("images", transposed=kind == "ConvTranspose", **options)  # type: ignore[arg-type]
    return s.model(s.node("Relu", s.norm(x)))


def _between(*middle: tuple[str, dict[str, object]], positive: bool = True) -> ModelProto:
    s = Sketch()
    x = s.conv("images")
    for kind, attributes in middle:
        x = s.node(kind, x, **attributes)
    return s.model(s.norm(x, positive=positive))


def _before(pads: int, *, shift: bool = True, groups: int = 1) -> ModelProto:
    s = Sketch()
    return s.model(s.conv(s.norm(s.node("Relu", "images"), shift=shift), groups=groups, pads=[pads] * 4))


def _linear(kind: str, *, alpha: float = 1.0, beta: float = 1.0, rank: int = 2, chain: bool = False) -> ModelProto:
    s = Sketch(4, size=(4,) if rank == 3 else (2, 2))
    x = "images" if rank == 3 else s.node("Flatten", "images")
    inputs, outputs = (4, 4) if rank == 3 else (16, 5)
    if kind == "Gemm":
        x = s.gemm(x, inputs, outputs, alpha=alpha, beta=beta)
    else:
        x = s.node("MatMul", x, s.constant(s.rng.standard_normal((inputs, outputs))), channels=outputs)
        x = s.node("Add", x, s.constant(s.rng.standard_normal(outputs)))
    x = s.norm(x)
    return s.model(s.norm(x) if chain else x)


def _two_heads(*, linear: bool = False) -> ModelProto:
    """Two layers without a bias on one input, each with its BatchNorm: a block's main and downsample branch."""
    s = Sketch(size=(2, 2))
    x = s.node("Flatten", "images") if linear else s.node("Relu", "images")
    heads = [s.norm(s.gemm(x, 16, bias=False) if linear else s.conv(x, kernel=1, bias=False)) for _ in range(2)]
    return s.model(*heads)


def _shared_weight(*, norms: int) -> ModelProto:
    s = Sketch()
    weight = s.constant(s.rng.standard_normal((4, 4, 3, 3)), "shared")
    first = s.norm(s.conv("images", 4, weight=weight, bias=False))
    second = s.conv(s.node("Relu", "images"), 4, weight=weight, bias=False)
    return s.model(s.node("Relu", first), s.norm(second) if norms == 2 else second)


def _shared_beta() -> ModelProto:
    s = Sketch()
    beta = s.constant(s.rng.standard_normal(6), "beta")
    return s.model(s.norm(s.conv("images"), beta=beta), s.norm(s.conv("images"), beta=beta))


def _used_elsewhere() -> ModelProto:
    s = Sketch()
    x = s.conv("images")
    return s.model(s.node("Mul", s.norm(x), s.node("Sigmoid", x)))


def _concat() -> ModelProto:
    s = Sketch()
    return s.model(s.norm(s.node("Concat", s.conv("images", 2), s.conv("images", 5), channels=7, axis=1)))


def _add() -> ModelProto:
    s = Sketch()
    return s.model(s.norm(s.node("Add", s.conv("images"), s.conv("images", bias=False))))


def _chain() -> ModelProto:
    s = Sketch()
    return s.model(s.norm(s.norm(s.conv("images"))))


def _chain_after_relu() -> ModelProto:
    s = Sketch()
    return s.model(s.norm(s.norm(s.node("Relu", s.conv("images")))))


def _decomposed(*, conv: bool = True) -> ModelProto:
    """As tf2onnx writes Keras's BatchNormalization: a product and a sum; or wholly spelled out."""
    s = Sketch()
    x = s.conv("images", bias=False)
    if conv:
        return s.model(s.arithmetic("Add", s.arithmetic("Mul", x, s.rng.standard_normal(6)), s.rng.standard_normal(6)))
    for kind in ("Sub", "Div", "Mul", "Add"):
        x = s.arithmetic(kind, x, s.rng.standard_normal(6) + 3)
    return s.model(x)


def _reshape_between() -> ModelProto:
    s = Sketch()
    x = s.node("Reshape", s.conv("images"), s.constant(np.array([-1, 6, 36])))
    return s.model(s.norm(x))


def _pooled_head() -> ModelProto:
    s = Sketch()
    x = s.node("Flatten", s.node("GlobalAveragePool", s.node("Relu", s.conv("images"))))
    return s.model(s.gemm(s.norm(x), 6))


def _flatten_to_linear() -> ModelProto:
    s = Sketch()
    return s.model(s.gemm(s.node("Flatten", s.norm(s.node("Relu", "images"))), 256))


def _half() -> ModelProto:
    s = Sketch()
    return s.model(s.node("Relu", s.norm(s.conv("images"))), half=True)


POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
PATTERNS = (
    Pattern("Conv1d, BN", True, lambda: _after(size=(9,))),
    Pattern("Conv2d, BN", True, lambda: _after(pads=[1] * 4)),
    Pattern("Conv3d, BN", True, lambda: _after(size=(5, 5, 5))),
    Pattern("grouped Conv, BN", True, lambda: _after(groups=2), "LeViT PR #22"),
    Pattern("depthwise Conv, BN", True, lambda: _after(outputs=4, groups=4)),
    Pattern("ConvTranspose, BN", True, lambda: _after("ConvTranspose"), "ultralytics PR #25364"),
    Pattern("ConvTranspose with as many inputs as outputs, BN", True, lambda: _after("ConvTranspose", outputs=4),
            "ultralytics PR #25364"),
    Pattern("grouped ConvTranspose, BN", True, lambda: _after("ConvTranspose", groups=2), "onnxscript#2867"),
    Pattern("depthwise ConvTranspose, BN", True, lambda: _after("ConvTranspose", outputs=4, groups=4), "torch#180995"),
    Pattern("Gemm, BN", True, lambda: _linear("Gemm"), "pytorch#118990, #72049, ao#4116"),
    Pattern("Gemm with alpha and beta, BN", True, lambda: _linear("Gemm", alpha=0.5, beta=0.25), "onnxscript PR #3027"),
    Pattern("MatMul, Add, BN", True, lambda: _linear("MatMul")),
    Pattern("MatMul on 3 axes, BN over another", False, lambda: _linear("MatMul", rank=3), "torch.fx, by equal sizes"),
    Pattern("two Convs without bias on one input, each BN", True, _two_heads, "pytorch#169178, #166797, D-FINE-seg#40"),
    Pattern("two Gemms without bias on one input, each BN", True, lambda: _two_heads(linear=True), "pytorch#174042"),
    Pattern("one weight, two Convs, one BN", True, lambda: _shared_weight(norms=1), "pytorch#197539, optimizer#174"),
    Pattern("one weight, two Convs, two BN", True, lambda: _shared_weight(norms=2), "TNN#808"),
    Pattern("two BN with one β", True, _shared_beta, "onnxruntime-qnn PR #582"),
    Pattern("Conv used elsewhere too, BN", False, _used_elsewhere, "pytorch PR #52758"),
    Pattern("Conv, BN, BN", True, _chain, "tensorflow-onnx#2186"),
    Pattern("Gemm, BN, BN", True, lambda: _linear("Gemm", chain=True)),
    Pattern("Conv, ReLU, BN, BN", False, _chain_after_relu),
    Pattern("Conv, Reshape, BN", True, _reshape_between, "tensorflow-onnx#2300"),
    Pattern("Conv, Identity, Dropout, BN", True, lambda: _between(("Identity", {}), ("Dropout", {}), positive=False)),
    Pattern("Conv, AveragePool, BN", True, lambda: _between(("AveragePool", POOL), positive=False)),
    Pattern("Conv, AveragePool counting its padding, BN", False,
            lambda: _between(("AveragePool", POOL | {"pads": [1] * 4, "count_include_pad": 1}))),
    Pattern("Conv, MaxPool, BN with γ > 0", True, lambda: _between(("MaxPool", POOL | {"pads": [1] * 4}))),
    Pattern("Conv, MaxPool, BN with a γ < 0", False, lambda: _between(("MaxPool", POOL), positive=False)),
    Pattern("Conv, ReLU, BN", False, lambda: _between(("Relu", {}))),
    Pattern("BN, Conv without padding", True, lambda: _before(0)),
    Pattern("BN, grouped Conv without padding", True, lambda: _before(0, groups=2)),
    Pattern("BN, Conv with padding", False, lambda: _before(1), "border pixels"),
    Pattern("BN without shift, Conv with padding", True, lambda: _before(1, shift=False)),
    Pattern("BN, Flatten, Gemm", True, _flatten_to_linear),
    Pattern("ReLU, pool, Flatten, BN, Gemm", True, _pooled_head),
    Pattern("Concat of Convs, BN", True, _concat),
    Pattern("Add of Convs, BN", True, _add),
    Pattern("Conv, Mul, Add by constants", True, _decomposed),
    Pattern("Conv, Sub, Div, Mul, Add by constants", True, lambda: _decomposed(conv=False)),
    Pattern("float16 Conv, BN", True, _half),
)  # fmt: skip
