"""The steps of an exact model, as records. Every tensor between them is uint8; only the logits are float32."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

BYTE = 255  # the largest value of a tensor between steps


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """Bytes change place, or one of several is taken: Transpose, Concat, Pad, MaxPool, Clip and their like."""

    name: str
    node: onnx.NodeProto
    inputs: tuple[str, ...]  # tensors; constants are in `constants`, by their input's position
    outputs: tuple[str, ...]
    constants: dict[int, NDArray[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class Convolution:
    """y = clip(round((Σ (x − x_zero)·weight + bias) · factor) + y_zero), one rounded product behind an exact sum.

    Shapes: weight int8 (K, C/groups, *kernel), bias int32 (K,), factor float32 (K,). Outside the image x is x_zero.
    """

    name: str
    x: str
    y: str
    weight: NDArray[np.int8]
    bias: NDArray[np.int32]
    factor: NDArray[np.float32]
    x_zero: int
    y_zero: int
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int


@dataclass(frozen=True, slots=True)
class Operand:
    """One side of a Pair: a tensor, what one step of it is worth (a power of two), and its zero point."""

    tensor: str
    scale: float
    zero: int


@dataclass(frozen=True, slots=True)
class Pair:
    """y = clip(round((a ∘ b) / y_scale) + y_zero), ∘ being + or ·, with powers of two as scales: rounded once."""

    name: str
    operation: str  # Add or Mul
    a: Operand
    b: Operand
    y: Operand


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """y = entries[x]: a function of one number, such as a sigmoid, whose 256 values are known beforehand.

    `room` is how far, in steps of y, the nearest value lies from where rounding turns: runtimes compute the function
    in float32, each in its own way, and agree as long as they err by less.
    """

    name: str
    x: str
    y: str
    entries: NDArray[np.uint8]  # (256,)
    room: float
    nodes: tuple[onnx.NodeProto, ...]  # from DequantizeLinear to QuantizeLinear


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """logits = (Σ (x − x_zero)·weight + bias) · scale. Shapes: weight int8 (C, K), bias int32 (K,)."""

    name: str
    x: str
    y: str
    weight: NDArray[np.int8]
    bias: NDArray[np.int32]
    x_zero: int
    scale: np.float32


Step = Move | Convolution | Pair | Table | Head


@dataclass(frozen=True, slots=True)
class Steps:
    """A whole model: steps in an order in which they can be taken, from `image` to `logits`."""

    steps: tuple[Step, ...]
    image: str
    logits: str

    def products(self) -> Iterator[Convolution | Head]:
        """Yield the steps that sum products."""
        return (step for step in self.steps if isinstance(step, Convolution | Head))

    def tables(self) -> Iterator[Table]:
        """Yield the steps that look a function up."""
        return (step for step in self.steps if isinstance(step, Table))
