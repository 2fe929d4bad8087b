"""Small ONNX graphs with BatchNorm: what folds, what must stay, and each wrong fold that was published.

`PATTERNS` are what `benchmarks/folding.py` gives to every tool and what the tests hold foldserve to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, helper

from benchmarks.fold_sketch import Sketch


@dataclass(frozen=True, slots=True)
class Pattern:
    """One graph: what it shows, where it was seen go wrong, and whether it can be folded."""

    name: str
    folds: bool
    build: Callable[[], ModelProto]
    seen: str = ""


def _after(kind: str = "Conv", **options: Any) -> ModelProto:
    s = Sketch(size=options.pop("size", (8, 8)))
    x = s.conv("images", transposed=kind == "ConvTranspose", **options)
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


def _useless_reshapes() -> ModelProto:
    s = Sketch()
    x = s.conv("images")
    for _ in range(2):
        x = s.node("Reshape", x, s.constant(np.array([-1, 6, 6, 6])))
    return s.model(s.norm(x))


def _two_layers() -> ModelProto:
    s = Sketch()
    return s.model(s.node("Relu", s.norm(s.conv(s.norm(s.conv("images")), groups=2))))


def _bias_but_no_shift() -> ModelProto:
    s = Sketch()
    return s.model(s.norm(s.conv("images"), beta=s.constant(np.zeros(6))))


def _constant_nodes() -> ModelProto:
    """Weights in Constant nodes, as some exporters write them, and those of the BatchNorm as initializers."""
    s = Sketch()
    model = s.model(s.node("Relu", s.norm(s.conv("images"))))
    weights = list(model.graph.initializer[:2])
    nodes = [helper.make_node("Constant", [], [one.name], value=one) for one in weights] + list(model.graph.node)
    del model.graph.initializer[:2], model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


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
    Pattern("Conv2d, BN", True, lambda: _after(pads=[1] * 4), "onnx-tensorrt#594, onnx/optimizer#255"),
    Pattern("Conv3d, BN", True, lambda: _after(size=(5, 5, 5))),
    Pattern("grouped Conv, BN", True, lambda: _after(groups=2), "LeViT#22"),
    Pattern("depthwise Conv, BN", True, lambda: _after(outputs=4, groups=4)),
    Pattern("ConvTranspose, BN", True, lambda: _after("ConvTranspose"), "ultralytics#25364"),
    Pattern("ConvTranspose with as many inputs as outputs, BN", True, lambda: _after("ConvTranspose", outputs=4),
            "ultralytics#25364"),
    Pattern("grouped ConvTranspose, BN", True, lambda: _after("ConvTranspose", groups=2), "onnxscript#2867"),
    Pattern("depthwise ConvTranspose, BN", True, lambda: _after("ConvTranspose", outputs=4, groups=4),
            "pytorch#180995, pytorch#184076"),
    Pattern("Gemm, BN", True, lambda: _linear("Gemm"), "pytorch#118990, pytorch#72049, pytorch/ao#4116"),
    Pattern("Gemm with alpha and beta, BN", True, lambda: _linear("Gemm", alpha=0.5, beta=0.25), "onnxscript#3027"),
    Pattern("MatMul, Add, BN", True, lambda: _linear("MatMul")),
    Pattern("MatMul on 3 axes, BN over another", False, lambda: _linear("MatMul", rank=3),
            "pytorch/ao#4116"),
    Pattern("two Convs without bias on one input, each BN", True, _two_heads,
            "pytorch#169178, pytorch#166797, D-FINE-seg#40"),
    Pattern("two Gemms without bias on one input, each BN", True, lambda: _two_heads(linear=True), "pytorch#174042"),
    Pattern("one weight, two Convs, one BN", True, lambda: _shared_weight(norms=1),
            "pytorch#197539, onnx/optimizer#174"),
    Pattern("one weight, two Convs, two BN", True, lambda: _shared_weight(norms=2), "TNN#808"),
    Pattern("two BN with one β", True, _shared_beta, "onnxruntime-qnn#582"),
    Pattern("Conv used elsewhere too, BN", False, _used_elsewhere, "pytorch#52758"),
    Pattern("Conv, BN, Conv, BN", True, _two_layers, "tensorflow-onnx#2186"),
    Pattern("Conv with bias, BN with β of 0", True, _bias_but_no_shift, "optimum#348"),
    Pattern("Conv with weights in Constant nodes, BN", True, _constant_nodes, "onnx/optimizer#133"),
    Pattern("Conv, BN, BN", True, _chain),
    Pattern("Gemm, BN, BN", True, lambda: _linear("Gemm", chain=True)),
    Pattern("Conv, ReLU, BN, BN", False, _chain_after_relu),
    Pattern("Conv, Reshape, BN", True, _reshape_between),
    Pattern("Conv, two Reshapes to its own shape, BN", True, _useless_reshapes, "tensorflow-onnx#2300"),
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
