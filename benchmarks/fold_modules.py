"""The patterns as PyTorch networks, for tools that take no ONNX file: one module for each layer, traced."""

import operator
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import fx, nn

CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
TRANSPOSED = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
GLOBAL_POOLS: dict[int, Any] = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
POOLS: dict[str, dict[int, Any]] = {
    "MaxPool": {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d},
    "AveragePool": {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d},
}
ARITHMETIC = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.truediv}


def to_modules(model: ModelProto) -> fx.GraphModule:
    """Return the same network; layers that share a stored weight are one module."""
    return Builder(model).build()


class Builder:
    """Goes through the nodes of a file."""

    def __init__(self, model: ModelProto) -> None:
        """Read its constants."""
        self.model = model
        self.stored = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant":
                self.stored[node.output[0]] = torch.from_numpy(numpy_helper.to_array(node.attribute[0].t).copy())
        self.root = nn.Module()
        self.graph = fx.Graph(self.root)
        self.values: dict[str, Any] = {}
        self.shared: dict[tuple[str, ...], str] = {}
        self.ranks: dict[str, int] = {}

    def build(self) -> fx.GraphModule:
        """Return the network in evaluation mode."""
        image = self.model.graph.input[0]
        self.values[image.name] = self.graph.placeholder("images")
        self.ranks[image.name] = len(image.type.tensor_type.shape.dim)
        for node in self.model.graph.node:
            if node.op_type != "Constant":
                self.values[node.output[0]] = self.add(node)
        self.graph.output(tuple(self.values[one.name] for one in self.model.graph.output))
        return fx.GraphModule(self.root, self.graph).eval()

    def add(self, node: NodeProto) -> fx.Node:
        """Add one node."""
        given = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        flowing = [self.values[name] for name in node.input if name in self.values]
        constants = [self.stored[name] for name in node.input if name in self.stored]
        rank = self.ranks[next(name for name in node.input if name in self.ranks)]
        if node.op_type == "Reshape":
            rank = len(constants[0])
        self.ranks[node.output[0]] = 2 if node.op_type == "Flatten" else rank
        if node.op_type in ARITHMETIC:
            return self.graph.call_function(ARITHMETIC[node.op_type], tuple(self.operands(node)))
        if node.op_type == "Concat":
            return self.graph.call_function(torch.cat, (flowing, given["axis"]))
        if node.op_type == "Reshape":
            return self.graph.call_method("reshape", (flowing[0], tuple(constants[0].tolist())))
        names = tuple(name for name in node.input if name in self.stored)
        path = self.shared.get(names) if names else None
        if path is None:
            path = node.name
            self.root.add_module(path, module_of(node.op_type, given, constants, rank))
            self.shared[names] = path
        return self.graph.call_module(path, tuple(flowing))

    def operands(self, node: NodeProto) -> list[Any]:
        """Return both operands, constants as buffers."""
        operands = []
        for name in node.input:
            if name in self.stored and name not in self.values:
                self.root.register_buffer(name, self.stored[name])
                operands.append(self.graph.get_attr(name))
            else:
                operands.append(self.values[name])
        return operands


def module_of(kind: str, given: dict[str, Any], constants: list[torch.Tensor], rank: int) -> nn.Module:
    """Return the module of one node, with its numbers."""
    dims, pads = rank - 2, (given.get("pads") or [0])[0]
    if kind in {"Conv", "ConvTranspose"}:
        return convolution(kind, given, constants, pads)
    if kind in {"Gemm", "MatMul"}:
        return linear(kind, given, constants)
    if kind == "BatchNormalization":
        norm = NORMS[rank](len(constants[0]), eps=given["epsilon"])
        names = ("weight", "bias", "running_mean", "running_var")
        norm.load_state_dict(dict(zip(names, constants, strict=True)) | {"num_batches_tracked": torch.tensor(9)})
        return norm
    plain = {
        "Relu": nn.ReLU,
        "Sigmoid": nn.Sigmoid,
        "Identity": nn.Identity,
        "Dropout": nn.Dropout,
        "Flatten": nn.Flatten,
    }
    if kind in plain:
        return plain[kind]()
    if kind == "GlobalAveragePool":
        return GLOBAL_POOLS[dims](1)
    options = {} if kind == "MaxPool" else {"count_include_pad": bool(given.get("count_include_pad", 0))}
    size = [given["kernel_shape"], given["strides"], pads]
    return POOLS[kind][dims](*(one[0] if dims == 1 and isinstance(one, list) else one for one in size), **options)


def convolution(kind: str, given: dict[str, Any], constants: list[torch.Tensor], pads: int) -> nn.Module:
    """Return a convolution or its transpose."""
    weight, groups = constants[0], given.get("group", 1)
    first, second, *kernel = weight.shape
    channels = (first, second * groups) if kind == "ConvTranspose" else (second * groups, first)
    classes: Any = TRANSPOSED if kind == "ConvTranspose" else CONVOLUTIONS
    layer = classes[weight.ndim](*channels, kernel, padding=pads, groups=groups, bias=len(constants) > 1)
    return with_numbers(layer, constants)


def linear(kind: str, given: dict[str, Any], constants: list[torch.Tensor]) -> nn.Module:
    """Return a linear layer; alpha and beta go into its numbers, for PyTorch has none."""
    weight = constants[0] * given.get("alpha", 1.0) if kind == "Gemm" else constants[0].T
    constants = [weight, *(bias * given.get("beta", 1.0) for bias in constants[1:])]
    return with_numbers(nn.Linear(weight.shape[1], weight.shape[0], bias=len(constants) > 1), constants)


def with_numbers(layer: Any, constants: list[torch.Tensor]) -> nn.Module:
    """Give a layer its weight and bias."""
    layer.weight = nn.Parameter(constants[0].contiguous())
    if len(constants) > 1:
        layer.bias = nn.Parameter(constants[1])
    assert np.isfinite(constants[0].numpy()).all()
    return layer.to(constants[0].dtype)
