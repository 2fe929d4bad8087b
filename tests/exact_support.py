"""Random exact models by `onnx.helper` alone, with an int64 oracle that shares no code with the service.

Each step writes its nodes and, in the same breath, what they mean as a function of int64 arrays.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

LIMIT = 2**24
OPSET = 20
LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "leaky": lambda x: np.where(x < 0, np.float64(np.float32(0.1)) * x, x),
    "erf": np.vectorize(math.erf),
}


@dataclass
class Graph:
    """An exact model under construction. Tensors are (batch, channels, side, side) until `head`; `values` are int64."""

    images: np.ndarray
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.values["image"] = self.images.astype(np.int64)

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def constant(self, value) -> str:
        name = self.name("constant")
        self.constants[name] = np.asarray(value)
        return name

    def node(self, operator: str, inputs: list[str], **attributes) -> str:
        """Write a node of one output, which gets a name of its own."""
        output = self.name(operator.lower())
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"node/{output}", **attributes))
        return output

    def holds(self, name: str, value: np.ndarray) -> str:
        self.values[name] = value
        return name

    def planes(self) -> str:
        return self.holds(
            self.node("Transpose", ["image"], perm=[0, 3, 1, 2]), self.values["image"].transpose(0, 3, 1, 2)
        )

    def conv(self, x: str, weight, bias, factor, *, x_zero=0, y_zero=0, stride=1, pad=0, dilation=1, groups=1) -> str:
        """QLinearConv; weight (K, C/groups, h, w), bias and factor (K,)."""
        weight, bias, factor = np.asarray(weight, np.int8), np.asarray(bias, np.int32), np.asarray(factor, np.float32)
        one = self.constant(np.float32(1))
        inputs = [x, one, self.constant(np.uint8(x_zero)), self.constant(weight), self.constant(factor)]
        inputs += [self.constant(np.int8(0)), one, self.constant(np.uint8(y_zero)), self.constant(bias)]
        sides = {"strides": [stride] * 2, "pads": [pad] * 4, "dilations": [dilation] * 2, "group": groups}
        y = self.node("QLinearConv", inputs, **sides)
        sums = convolve(self.values[x] - x_zero, weight.astype(np.int64), stride, pad, dilation, groups)
        sums += bias.astype(np.int64)[:, None, None]
        return self.holds(y, to_bytes(sums.astype(np.float32) * factor[:, None, None], y_zero))

    def dequantize(self, x: str, scale: float, zero: int) -> str:
        return self.node("DequantizeLinear", [x, self.constant(np.float32(scale)), self.constant(np.uint8(zero))])

    def quantize(self, x: str, scale: float, zero: int) -> str:
        return self.node("QuantizeLinear", [x, self.constant(np.float32(scale)), self.constant(np.uint8(zero))])

    def pair(self, operator: str, a: str, b: str, scales=(1.0, 1.0, 1.0), zeros=(0, 0, 0)) -> str:
        """DequantizeLinear twice → Add or Mul → QuantizeLinear; scales and zero points of a, b and the result."""
        real = [self.dequantize(name, scales[at], zeros[at]) for at, name in enumerate((a, b))]
        y = self.quantize(self.node(operator, real), scales[2], zeros[2])
        left, right = ((self.values[name] - zeros[at]) * scales[at] for at, name in enumerate((a, b)))
        made = left + right if operator == "Add" else left * right
        return self.holds(y, to_bytes(made / scales[2], zeros[2]))

    def table(self, function: str, x: str, x_scale: float, x_zero: int, y_scale: float, y_zero: int) -> str:
        real = self.dequantize(x, x_scale, x_zero)
        operators = {"sigmoid": "Sigmoid", "tanh": "Tanh", "hardswish": "HardSwish", "erf": "Erf"}
        if function == "silu":
            made = self.node("Mul", [real, self.node("Sigmoid", [real])])
        elif function == "leaky":
            made = self.node("LeakyRelu", [real], alpha=0.1)
        else:
            made = self.node(operators[function], [real])
        entries = to_bytes(table_values(function, x_scale, x_zero, y_scale), y_zero)
        return self.holds(self.quantize(made, y_scale, y_zero), entries[self.values[x]])

    def max_pool(self, x: str, side: int, stride: int, pad: int = 0) -> str:
        y = self.node("MaxPool", [x], kernel_shape=[side] * 2, strides=[stride] * 2, pads=[pad] * 4)
        padded = np.pad(self.values[x], ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=-1)
        parts = list(shifted(padded, side, stride, 1))
        return self.holds(y, np.max([part for _, part in parts], axis=0))

    def concat(self, *parts: str) -> str:
        return self.holds(self.node("Concat", [*parts], axis=1), np.concatenate([self.values[one] for one in parts], 1))

    def pad(self, x: str, filler: int) -> str:
        sides = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
        y = self.node("Pad", [x, self.constant(sides), self.constant(np.uint8(filler))])
        edges = ((0, 0), (0, 0), (1, 1), (1, 1))
        return self.holds(y, np.pad(self.values[x], edges, constant_values=filler))

    def clip(self, x: str, low: int, high: int) -> str:
        limits = [self.constant(np.uint8(low)), self.constant(np.uint8(high))]
        return self.holds(self.node("Clip", [x, *limits]), self.values[x].clip(low, high))

    def framed_channels(self, x: str, fillers: list[int]) -> str:
        """Split, pad each channel with a byte of its own, Concat: what three channels of pixels need."""
        parts = [f"{x}/part{index}" for index in range(len(fillers))]
        sizes = self.constant(np.ones(len(fillers), np.int64))
        self.nodes.append(helper.make_node("Split", [x, sizes], parts, name=f"{x}/split", axis=1))
        for index, part in enumerate(parts):
            self.holds(part, self.values[x][:, index : index + 1])
        return self.concat(*(self.pad(part, filler) for part, filler in zip(parts, fillers, strict=True)))

    def head(self, x: str, weight, bias, scale: float, *, x_zero: int = 0, weight_zero: bool = True) -> np.ndarray:
        """Flatten → MatMulInteger → Add → Cast → Mul; weight (features, classes). Returns the logits, float32."""
        weight, bias = np.asarray(weight, np.int8), np.asarray(bias, np.int32)
        flat = self.node("Flatten", [x], axis=1)
        zeros = [self.constant(np.uint8(x_zero)), *([self.constant(np.int8(0))] if weight_zero else [])]
        total = self.node(
            "Add", [self.node("MatMulInteger", [flat, self.constant(weight), *zeros]), self.constant(bias)]
        )
        real = self.node("Cast", [total], to=TensorProto.FLOAT)
        multiplier = self.constant(np.float32(scale))
        self.nodes.append(helper.make_node("Mul", [real, multiplier], ["logits"], name="node/logits"))
        features = self.values[x].reshape(len(self.images), -1)
        sums = (features - x_zero) @ weight.astype(np.int64) + bias.astype(np.int64)
        self.values["logits"] = sums.astype(np.float32) * np.float32(scale)
        return self.values["logits"]

    def model(self) -> onnx.ModelProto:
        sides = self.images.shape[1:]
        classes = self.values["logits"].shape[1]
        proto = helper.make_graph(
            self.nodes,
            "exact",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", *sides])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        return helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def shifted(x: np.ndarray, kernel: int, stride: int, dilation: int):
    """Yield each place of a square window, with the values that it sees."""
    side = (x.shape[-1] - dilation * (kernel - 1) - 1) // stride + 1
    for row, column in product(range(kernel), repeat=2):
        rows, columns = (slice(at * dilation, at * dilation + stride * (side - 1) + 1, stride) for at in (row, column))
        yield (row, column), x[:, :, rows, columns]


def convolve(x: np.ndarray, weight: np.ndarray, stride: int, pad: int, dilation: int, groups: int) -> np.ndarray:
    """Return the sums of a convolution, int64 (N, K, h, w), for x int64 (N, C, H, H), square in all."""
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    made = []
    for inputs, filters in zip(np.split(padded, groups, 1), np.split(weight, groups), strict=True):
        places = shifted(inputs, weight.shape[-1], stride, dilation)
        made.append(sum(np.einsum("nchw,kc->nkhw", seen, filters[:, :, r, c]) for (r, c), seen in places))
    sums = np.concatenate(made, axis=1)
    assert sums.dtype == np.int64
    return sums


def to_bytes(value: np.ndarray, zero: int) -> np.ndarray:
    """Round half to even, move by the zero point, clip to a byte; int64."""
    return np.clip(np.rint(value) + zero, 0, 255).astype(np.int64)


def table_values(function: str, x_scale: float, x_zero: int, y_scale: float) -> np.ndarray:
    """Return a function's 256 values in steps of the result, float64, before they are rounded."""
    steps = (np.arange(256) - x_zero).astype(np.float64) * np.float64(np.float32(x_scale))
    return FUNCTIONS[function](steps) / np.float64(np.float32(y_scale))


def room_of(values: np.ndarray) -> float:
    """Return how far the nearest value lies from a tie."""
    return float(np.abs(values - np.floor(values) - 0.5).min())


def worst_sum(weight: np.ndarray, x_zero: int) -> np.ndarray:
    """Return the largest magnitude of a partial sum of each output channel, by trying both ends at every term."""
    flat = weight.reshape(len(weight), -1).astype(np.int64)
    ends = np.stack([flat * (255 - x_zero), flat * -x_zero])
    return np.maximum(ends.max(0).clip(0).sum(1), -ends.min(0).clip(None, 0).sum(1))


def session(model: onnx.ModelProto, level: str = "all", threads: int = 1, optimized: Path | None = None):
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, images: np.ndarray, level: str = "all", threads: int = 1) -> np.ndarray:
    return session(model, level, threads).run(None, {"image": images})[0]


def bits(logits: np.ndarray) -> list[list[int]]:
    """Return float32 numbers as their bits."""
    assert logits.dtype == np.float32
    return np.ascontiguousarray(logits).view(np.uint32).tolist()
