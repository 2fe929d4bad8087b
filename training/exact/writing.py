"""A Network and its grids → `exact.onnx`, standard ONNX operators alone, in the grammar of `service.integers`."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.artifact import INPUT_NAME, OUTPUT_NAME
from service.integers.steps import BYTE
from training.exact.calibration import Observed
from training.exact.grids import Grid
from training.exact.network import AveragePool, Clipped, Conv, Function, Linear, Move, Network, Pair
from training.exact.quantizing import MOST_BITS, Quantized, correct_bias, quantize

OPSET, IR_VERSION = 20, 10
PIXELS = "pixels"


def write_exact(
    network: Network, grids: Mapping[str, Grid], observed: Mapping[str, Observed], most_bits: int = MOST_BITS
) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Return the exact model and the bits, at most `most_bits`, of each layer's weights. Raises NotConvertible."""
    return _Writer(network, grids, observed, most_bits).write()


class _Writer:
    """Writes one model, layer by layer; tensors keep the network's names."""

    def __init__(
        self, network: Network, grids: Mapping[str, Grid], observed: Mapping[str, Observed], most_bits: int
    ) -> None:
        self._most_bits = most_bits
        self._network, self._grids, self._observed = network, grids, observed
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._bits: dict[str, int] = {}

    def write(self) -> tuple[onnx.ModelProto, dict[str, int]]:
        self._add("Transpose", [INPUT_NAME], PIXELS, perm=[0, 3, 1, 2])
        for layer in self._network.layers:
            self._write(layer)
        self._head(self._network.head)
        channels = len(self._network.scale)
        image = helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, ["batch", *self._network.size, channels])
        classes = len(self._network.head.bias)
        logits = helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", classes])
        graph = helper.make_graph(self._nodes, "exact", [image], [logits], list(self._constants.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), self._bits

    def _write(self, layer: Conv | Linear | AveragePool | Pair | Function | Move) -> None:
        if isinstance(layer, Move):
            self._move(layer)
        elif isinstance(layer, Function):
            self._function(layer)
        elif isinstance(layer, Pair):
            self._pair(layer)
        elif isinstance(layer, AveragePool):
            self._average(layer)
        elif isinstance(layer, Linear):
            self._linear(layer)
        elif layer.x == self._network.image:
            self._first(layer)
        else:
            self._conv(layer, layer.x, self._grids[layer.x])

    def _first(self, layer: Conv) -> None:
        """Write the convolution that reads pixels, mean and deviation within; outside the image lies the mean."""
        network = self._network
        means = -network.shift / network.scale  # the pixel that stands for zero, one a channel
        pads = np.clip(np.rint(means), 0, BYTE).astype(np.uint8)
        per_group = layer.weight.shape[1]
        group = np.arange(len(layer.weight)) // (len(layer.weight) // layer.groups)
        channel = group[:, None] * per_group + np.arange(per_group)  # (K, C/groups)
        spread = (..., *[None] * (layer.weight.ndim - 2))
        weight = layer.weight * network.scale[channel][spread]
        zero = int(pads[0]) if len(set(pads.tolist())) == 1 else 0
        shift = (weight * (zero - means[channel])[spread]).reshape(len(weight), -1).sum(1)
        moved = Conv(**{name: getattr(layer, name) for name in layer.__slots__})
        moved.weight, moved.bias, x = weight, layer.bias + shift, PIXELS
        if zero == 0 and any(layer.pads):
            x, moved.pads = self._padded_pixels(pads, layer.pads), (0,) * len(layer.pads)
        self._conv(moved, x, Grid(1.0, zero), corrected=False)

    def _padded_pixels(self, fillers: NDArray[np.uint8], pads: tuple[int, ...]) -> str:
        """Write Split, Pad each channel with its mean, Concat, on bytes."""
        sizes = self._constant("pixels/sizes", np.ones(len(fillers), np.int64))
        parts = [f"pixels/{index}" for index in range(len(fillers))]
        self._nodes.append(helper.make_node("Split", [PIXELS, sizes], parts, name="pixels/split", axis=1))
        half = len(pads) // 2
        written = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
        sides = self._constant("pixels/pads", written)
        padded = [
            self._add("Pad", [part, sides, self._constant(f"{part}/mean", filler)], f"{part}/padded", mode="constant")
            for part, filler in zip(parts, fillers, strict=True)
        ]
        return self._add("Concat", padded, "pixels/padded", axis=1)

    def _conv(self, layer: Conv, x: str, grid: Grid, *, corrected: bool = True) -> None:
        mean = self._observed[layer.x].mean if corrected else None
        done = self._quantized(layer, grid, mean, layer.groups)
        attributes = {"strides": layer.strides, "pads": layer.pads, "dilations": layer.dilations, "group": layer.groups}
        self._product(layer, x, grid, done.weight, done.bias, done.step, attributes)

    def _linear(self, layer: Linear) -> None:
        """Write a linear layer inside the network as a convolution of one position."""
        grid = self._grids[layer.x]
        done = self._quantized(layer, grid, self._observed[layer.x].mean, 1)
        axes = self._constant("axes/2,3", np.array([2, 3], np.int64))
        x = self._add("Unsqueeze", [layer.x, axes], f"{layer.y}/image")
        inner = Linear(layer.name, x, f"{layer.y}/pixel", layer.weight, layer.bias, layer.low, layer.high)
        self._product(inner, x, grid, done.weight[..., None, None], done.bias, done.step, {}, y_grid=layer.y)
        self._add("Flatten", [f"{layer.y}/pixel"], layer.y, axis=1)

    def _average(self, layer: AveragePool) -> None:
        """Write a mean as a sum; the factor behind it carries the division."""
        grid, size = self._grids[layer.x], math.prod(layer.kernel)
        weight = np.ones((layer.channels, 1, *layer.kernel), np.int8)
        step = np.full(layer.channels, grid.scale / size)
        attributes = {"strides": layer.strides, "pads": layer.pads, "group": layer.channels}
        self._product(layer, layer.x, grid, weight, np.zeros(layer.channels, np.int32), step, attributes)

    def _quantized(
        self, layer: Conv | Linear, grid: Grid, mean: Any, groups: int, *, shared: bool = False
    ) -> Quantized:
        limits: dict[str, Any] = {"shared": shared, "most_bits": self._most_bits}
        done = quantize(layer.name, layer.weight, layer.bias, grid.scale, grid.zero, **limits)
        if mean is not None:
            bias = correct_bias(layer.weight, done.real_weight(grid.scale), layer.bias, mean, groups)
            done = quantize(layer.name, layer.weight, bias, grid.scale, grid.zero, **limits)
        self._bits[layer.name] = done.bits
        return done

    def _product(
        self,
        layer: Clipped,
        x: str,
        grid: Grid,
        weight: NDArray[np.int8],
        bias: NDArray[np.int32],
        step: NDArray[np.float64],
        attributes: Mapping[str, Any],
        y_grid: str = "",
    ) -> None:
        out = self._grids[y_grid or layer.y]
        name = layer.y
        inputs = [
            x,
            self._one(),
            self._byte(grid.zero),
            self._constant(f"{name}/weight", weight),
            self._constant(f"{name}/factor", (step / out.scale).astype(np.float32)),
            self._constant("zero/int8", np.int8(0)),
            self._one(),
            self._byte(out.zero),
            self._constant(f"{name}/bias", bias),
        ]
        self._clipped("QLinearConv", inputs, layer, out, **attributes)

    def _pair(self, layer: Pair) -> None:
        a, b, y = (self._grids[name] for name in (layer.a, layer.b, layer.y))
        b_scale = b.scale if layer.operation == "Mul" else b.scale / a.scale
        sides = [
            self._add(
                "DequantizeLinear", [tensor, self._scale(_power(scale)), self._byte(side.zero)], f"{layer.y}/{at}"
            )
            for tensor, scale, side, at in ((layer.a, 1.0, a, "a"), (layer.b, b_scale, b, "b"))
        ]
        self._nodes.append(helper.make_node(layer.operation, sides, [f"{layer.y}/pair"], name=layer.name))
        inputs = [f"{layer.y}/pair", self._scale(_power(y.scale / a.scale)), self._byte(y.zero)]
        self._clipped("QuantizeLinear", inputs, layer, y, suffix="/round")

    def _function(self, layer: Function) -> None:
        x, y = self._grids[layer.x], self._grids[layer.y]
        inputs = [layer.x, self._scale(x.scale), self._byte(x.zero)]
        rename = {layer.x: self._add("DequantizeLinear", inputs, f"{layer.y}/real")}
        for node in layer.nodes:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            for place, name in enumerate(node.input):
                if name in layer.constants:
                    value = layer.constants[name].astype(np.float32).reshape(())
                    copied.input[place] = self._constant(f"{layer.y}/{name}", value)
                else:
                    copied.input[place] = rename.get(name, f"{layer.y}/{name}") if name else ""
            copied.output[0] = rename[node.output[0]] = f"{layer.y}/{node.output[0]}"
            self._nodes.append(copied)
        last = rename[layer.nodes[-1].output[0]]
        self._add("QuantizeLinear", [last, self._scale(y.scale), self._byte(y.zero)], layer.y)

    def _move(self, layer: Move) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(layer.node)
        del node.input[:], node.output[:]
        places = max([len(layer.inputs) - 1, *layer.constants], default=0) + 1
        node.input.extend([*layer.inputs, *[""] * (places - len(layer.inputs))])
        node.output.extend(layer.outputs)
        for place, value in layer.constants.items():
            node.input[place] = self._constant(f"{layer.outputs[0]}/{place}", value)
        if node.op_type == "Pad":
            filler = float(layer.constants[2].reshape(())) if 2 in layer.constants else 0.0
            node.input.extend([""] * (3 - len(node.input)))
            node.input[2] = self._byte(_byte_of(filler, self._grids[layer.outputs[0]]))
        node.name = layer.name
        self._nodes.append(node)

    def _head(self, head: Linear) -> None:
        grid = self._grids[head.x]
        done = self._quantized(head, grid, self._observed[head.x].mean, 1, shared=True)
        weight = self._constant("logits/weight", np.ascontiguousarray(done.weight.T))
        inputs = [head.x, weight, self._byte(grid.zero), self._constant("zero/int8", np.int8(0))]
        self._nodes.append(helper.make_node("MatMulInteger", inputs, ["logits/product"], name=head.name))
        self._add("Add", ["logits/product", self._constant("logits/bias", done.bias)], "logits/sum")
        self._add("Cast", ["logits/sum"], "logits/real", to=TensorProto.FLOAT)
        self._add("Mul", ["logits/real", self._scale(float(done.step[0]))], OUTPUT_NAME)

    def _clipped(
        self, operator: str, inputs: list[str], layer: Clipped, grid: Grid, suffix: str = "", **attributes: Any
    ) -> None:
        """Write a step that ends in bytes; where the grid's own ends do not clip as the layer does, clip bytes."""
        low = 0 if layer.low is None else _byte_of(layer.low, grid)
        high = BYTE if layer.high is None else _byte_of(layer.high, grid)
        is_inside = low == 0 and high == BYTE
        made = layer.y if is_inside else f"{layer.y}/wide"
        self._nodes.append(helper.make_node(operator, inputs, [made], name=layer.name + suffix, **attributes))
        if not is_inside:
            self._add("Clip", [made, self._byte(low), self._byte(high)], layer.y)

    def _one(self) -> str:
        return self._scale(1.0)

    def _scale(self, value: float) -> str:
        return self._constant(f"scale/{value!r}", np.float32(value))

    def _byte(self, value: int) -> str:
        return self._constant(f"byte/{value}", np.uint8(value))

    def _constant(self, name: str, value: Any) -> str:
        self._constants.setdefault(name, numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output


def _power(ratio: float) -> float:
    """Return the power of two that `ratio` is, but for the last bits."""
    return float(2.0 ** round(math.log2(ratio)))


def _byte_of(value: float, grid: Grid) -> int:
    return min(BYTE, max(0, round(value / grid.scale) + grid.zero))
