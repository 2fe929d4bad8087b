"""A folded classifier as the layers that an exact model has: still in float64, one record a layer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

Weights = NDArray[np.float64]


@dataclass(slots=True, eq=False)
class Conv:
    """A convolution; weight (K, C/groups, *kernel), bias (K,). `low` and `high` clip its output, as ReLU does."""

    name: str
    x: str
    y: str
    weight: Weights
    bias: Weights
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int
    low: float | None = None
    high: float | None = None


@dataclass(slots=True, eq=False)
class Linear:
    """A linear layer on (N, C): weight (K, C), bias (K,)."""

    name: str
    x: str
    y: str
    weight: Weights
    bias: Weights
    low: float | None = None
    high: float | None = None


@dataclass(slots=True, eq=False)
class AveragePool:
    """The mean of each window, what lies outside the image counted as 0."""

    name: str
    x: str
    y: str
    channels: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    low: float | None = None
    high: float | None = None


@dataclass(slots=True, eq=False)
class Pair:
    """The sum or the product of two tensors; `operation` is Add or Mul."""

    name: str
    operation: str
    a: str
    b: str
    y: str
    low: float | None = None
    high: float | None = None


@dataclass(slots=True, eq=False)
class Function:
    """A function of one number, as the ONNX nodes that compute it from `x`; `constants` are its scalars."""

    name: str
    x: str
    y: str
    nodes: tuple[onnx.NodeProto, ...]
    constants: dict[str, NDArray[Any]]


@dataclass(slots=True, eq=False)
class Move:
    """Values change place, or the largest of some is taken."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    node: onnx.NodeProto
    constants: dict[int, NDArray[Any]]


Layer = Conv | Linear | AveragePool | Pair | Function | Move
Clipped = Conv | Linear | AveragePool | Pair


@dataclass(slots=True)
class Network:
    """A classifier: pixels · `scale` + `shift`, per channel, is the tensor `image`; `head` gives the logits."""

    image: str
    scale: Weights
    shift: Weights
    size: tuple[int, int]
    layers: list[Layer]
    head: Linear
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # without the batch

    def readers(self) -> dict[str, list[Layer]]:
        """Return for each tensor the layers that read it; the head is one of them."""
        found: dict[str, list[Layer]] = {}
        for layer in (*self.layers, self.head):
            for name in inputs_of(layer):
                found.setdefault(name, []).append(layer)
        return found

    def makers(self) -> dict[str, Layer]:
        """Return the layer that makes each tensor."""
        return {name: layer for layer in self.layers for name in outputs_of(layer)}

    def weighted(self) -> Iterator[Conv | Linear]:
        """Yield the layers with weights, the head last."""
        yield from (layer for layer in self.layers if isinstance(layer, Conv | Linear))
        yield self.head


def inputs_of(layer: Layer) -> tuple[str, ...]:
    """Return the tensors that a layer reads."""
    if isinstance(layer, Move):
        return layer.inputs
    return (layer.a, layer.b) if isinstance(layer, Pair) else (layer.x,)


def outputs_of(layer: Layer) -> tuple[str, ...]:
    """Return the tensors that a layer makes."""
    return layer.outputs if isinstance(layer, Move) else (layer.y,)
