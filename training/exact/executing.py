"""A Network run in PyTorch, layer by layer: for calibration, and, with rounding put between, for fine-tuning."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as fn
from onnx import helper
from torch import Tensor

from training.errors import NotConvertible
from training.exact.moving import CONVOLUTIONS, move, padded
from training.exact.network import AveragePool, Conv, Function, Layer, Linear, Move, Network, Pair, inputs_of

Observe = Callable[[str, Tensor], Tensor]  # a tensor's name and values → what the next layers see
Attributes = Mapping[str, Any]
Weigh = Callable[[Conv | Linear], tuple[Tensor, Tensor]]  # a layer → the weight and bias to use

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "HardSwish": fn.hardswish,
    "Mish": fn.mish,
    "Neg": torch.neg,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Softplus": fn.softplus,
    "Softsign": fn.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Pow": torch.pow,
    "Max": torch.maximum,
    "Min": torch.minimum,
}


def standardise(network: Network, images: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """Return the tensor that the layers read, float32 (N, C, H, W), for pixels uint8 (N, H, W, C)."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    scale, shift = (torch.from_numpy(one).float().reshape(1, -1, 1, 1) for one in (network.scale, network.shift))
    return pixels * scale + shift


def plain_weights(layer: Conv | Linear) -> tuple[Tensor, Tensor]:
    """Return a layer's own weight and bias in float32."""
    return torch.from_numpy(layer.weight).float(), torch.from_numpy(layer.bias).float()


def run(network: Network, standardised: Tensor, observe: Observe, weigh: Weigh = plain_weights) -> Tensor:
    """Return the logits (N, K). `observe` sees every tensor as it is made, and gives back what goes on."""
    tensors = {network.image: observe(network.image, standardised)}
    last_use = {name: layer for layer in (*network.layers, network.head) for name in inputs_of(layer)}
    for layer in network.layers:
        made = _take(layer, tensors, weigh)
        tensors |= {name: observe(name, values) for name, values in made.items()}
        for name in inputs_of(layer):
            if last_use[name] is layer:
                tensors.pop(name, None)
    weight, bias = weigh(network.head)
    return fn.linear(tensors[network.head.x], weight, bias)


def _take(layer: Layer, tensors: Mapping[str, Tensor], weigh: Weigh) -> dict[str, Tensor]:
    if isinstance(layer, Move):
        parts = move(layer, [tensors[name] for name in layer.inputs])
        return dict(zip(layer.outputs, parts, strict=True))
    if isinstance(layer, Function):
        return {layer.y: _function(layer, tensors[layer.x])}
    made = _arithmetic(layer, tensors, weigh)
    clips = layer.low is not None or layer.high is not None
    return {layer.y: torch.clamp(made, layer.low, layer.high) if clips else made}


def _arithmetic(layer: Conv | Linear | AveragePool | Pair, tensors: Mapping[str, Tensor], weigh: Weigh) -> Tensor:
    if isinstance(layer, Pair):
        a, b = tensors[layer.a], tensors[layer.b]
        return a + b if layer.operation == "Add" else a * b
    x = tensors[layer.x]
    if isinstance(layer, AveragePool):
        ones = torch.full((layer.channels, 1, *layer.kernel), 1 / float(np.prod(layer.kernel)))
        return CONVOLUTIONS[x.ndim](padded(x, layer.pads), ones, None, layer.strides, 0, 1, layer.channels)
    weight, bias = weigh(layer)
    if isinstance(layer, Linear):
        return fn.linear(x, weight, bias)
    framed = padded(x, layer.pads)
    return CONVOLUTIONS[x.ndim](framed, weight, bias, layer.strides, 0, layer.dilations, layer.groups)


def _function(layer: Function, x: Tensor) -> Tensor:
    values: dict[str, Any] = {layer.x: x}
    for node in layer.nodes:
        operands = [
            values[name] if name in values else torch.tensor(float(layer.constants[name].reshape(())))
            for name in node.input
            if name
        ]
        values[node.output[0]] = _apply(node, operands)
    result: Tensor = values[layer.nodes[-1].output[0]]
    return result


def _apply(node: onnx.NodeProto, operands: list[Tensor]) -> Tensor:
    given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    operator, x = node.op_type, operands[0]
    if operator in UNARY:
        return UNARY[operator](x)
    if operator in BINARY:
        return BINARY[operator](x, operands[1])
    if operator not in SHAPED:
        raise NotConvertible(
            f"node {node.name or node.output[0]} ({operator}): calibration does not know this function"
        )
    return SHAPED[operator](x, given, [float(one) for one in operands[1:]])


def _clip(x: Tensor, _: Attributes, limits: list[float]) -> Tensor:
    low, high = (*limits, None, None)[:2]
    return torch.clamp(x, low, high)


def _gelu(x: Tensor, given: Attributes, _: list[float]) -> Tensor:
    return fn.gelu(x, approximate="tanh" if given.get("approximate") == b"tanh" else "none")


SHAPED: dict[str, Callable[[Tensor, Attributes, list[float]], Tensor]] = {
    "Clip": _clip,
    "Elu": lambda x, given, _: fn.elu(x, given.get("alpha", 1.0)),
    "Gelu": _gelu,
    "HardSigmoid": lambda x, given, _: torch.clamp(x * given.get("alpha", 0.2) + given.get("beta", 0.5), 0, 1),
    "LeakyRelu": lambda x, given, _: fn.leaky_relu(x, given.get("alpha", 0.01)),
}
