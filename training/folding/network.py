"""A network as folding sees it: values, and the steps between them. Neither PyTorch nor ONNX; both are read into it.

Layer     a convolution or linear layer, with its weights in float64: can take a scale and shift in, on either side
Rescale   a scale and shift of each channel: BatchNorm at inference, or arithmetic with constants
Passage   lets a scale and shift through, under conditions of its own (`passages`)
Join      concatenates, adds or subtracts: shares a scale and shift out to its branches
Other     everything else; nothing gets past it
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from training.errors import NotFoldable
from training.folding.algebra import Affine, Array, affine_after, affine_before
from training.folding.passages import Change, Passing, Shape, Stays

Place = Literal["after", "before"]  # on which side of a layer the scale and shift stood


@dataclass(eq=False, slots=True)
class Value:
    """What flows from one step to others; a step that reads it twice is among its users twice."""

    name: str
    shape: Shape | None = None
    producer: "Step | None" = None
    users: list["Step"] = field(default_factory=list)
    escapes: bool = False  # an output of the network, or read where no step of it can be seen
    stands_for: str = ""  # the value of the network before folding that had these numbers; "" for none

    def __post_init__(self) -> None:
        self.stands_for = self.name

    @property
    def rank(self) -> int | None:
        """The number of its axes, None where unknown."""
        return None if self.shape is None else len(self.shape)

    @property
    def is_private(self) -> bool:
        """Whether one step alone sees it."""
        return len(self.users) == 1 and not self.escapes


@dataclass(eq=False, slots=True, kw_only=True)
class Step:
    """What computes `output` from `inputs`; constants are no inputs. `kind` is the framework's own word for it."""

    name: str
    kind: str
    inputs: list[Value]
    output: Value


@dataclass(eq=False, slots=True, kw_only=True)
class Layer(Step):
    """A convolution, weight (K, C/groups, *kernel) or (C, K/groups, *kernel), or a linear layer, weight (K, C)."""

    weight: Array
    bias: Array | None
    groups: int = 1
    transposed: bool = False
    pads_zeros: bool = False
    locked: str = ""  # why its weights must stay as they are
    limit: float = float(np.finfo(np.float32).max)  # the largest weight that can be stored
    changed: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether channels are the last axis, and not axis 1."""
        return self.weight.ndim == 2

    def check(self, change: Change, place: Place) -> tuple[Array, Array | None]:
        """Return weight and bias with `change` taken in, on the "after" or "before" side. Raises Stays."""
        if self.locked:
            raise Stays(self.locked)
        if not change.affine.is_uniform and change.axis != self._channel_axis(place):
            raise Stays(f"it works on another axis than the channels of {self.name}, or on one that is not known")
        affine = change.affine
        if place == "before" and affine.shift.any() and self.transposed:
            raise Stays(f"at the border of {self.name}, a transposed convolution, a shift before it arrives unevenly")
        if place == "before" and affine.shift.any() and self.pads_zeros:
            raise Stays(f"{self.name} pads with zeros, which a shift before it would have to spare")
        fold = affine_after if place == "after" else affine_before
        try:
            if place == "after":
                affine = affine.over(self.outputs, self.name)
            weight, bias = fold(self.weight, self.bias, affine, transposed=self.transposed, groups=self.groups)
        except NotFoldable as error:
            raise Stays(str(error)) from None
        self._check_room(weight, bias)
        return weight, bias

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        first, second = self.weight.shape[:2]
        return int(second * self.groups if self.transposed else first)

    def _channel_axis(self, place: Place) -> int | None:
        rank = (self.output if place == "after" else self.inputs[0]).rank
        return 1 if not self.is_linear else None if rank is None else rank - 1

    def _check_room(self, weight: Array, bias: Array | None) -> None:
        largest = max(float(np.abs(values).max(initial=0)) for values in (weight, bias) if values is not None)
        if not largest <= self.limit:
            raise Stays(f"a weight of {self.name} would become {largest:.3g}; its type ends at {self.limit:.5g}")


@dataclass(frozen=True, slots=True)
class Account:
    """One BatchNorm, or what stands for it: its name, kind and the range of its scales."""

    name: str
    kind: str
    scale_min: float
    scale_max: float

    @classmethod
    def of(cls, name: str, kind: str, affine: Affine) -> "Account":
        """Describe `affine`."""
        size = np.abs(affine.scale)
        return cls(name, kind, float(size.min()), float(size.max()))


@dataclass(eq=False, slots=True, kw_only=True)
class Rescale(Step):
    """y = scale·x + shift along `axis`, None for the same everywhere."""

    affine: Affine
    axis: int | None
    accounts: list[Account]
    locked: str = ""  # why it must stay where it is
    frozen: str = ""  # why it may go but not change
    notable: bool = True  # worth a line in the report where it stays: a BatchNorm, or a scale per channel
    changed: bool = False
    removed: bool = False

    @property
    def change(self) -> Change:
        """What it does, on its way to another place."""
        return Change(self.affine, None if self.affine.is_uniform else self.axis)

    def check(self, change: Change, place: Place) -> Affine:
        """Return what it becomes with `change` taken in. Raises Stays."""
        if self.locked or self.frozen:
            raise Stays(self.locked or self.frozen)
        if None not in (change.axis, self.change.axis) and change.axis != self.axis:
            raise Stays(f"it works on another axis than {self.name}")
        if change.axis is not None and len(change.affine.scale) != len(self.affine.scale):
            raise Stays(f"{self.name} has other channels")
        return self.affine.then(change.affine) if place == "after" else change.affine.then(self.affine)


@dataclass(eq=False, slots=True, kw_only=True)
class Passage(Step):
    """What lets a change through by `rule`."""

    rule: Passing


@dataclass(eq=False, slots=True, kw_only=True)
class Join(Step):
    """Concat along `axis` (counted from 0), or, where it is None, a sum whose terms have `signs`."""

    axis: int | None = None
    signs: Sequence[int] = ()


@dataclass(eq=False, slots=True, kw_only=True)
class Other(Step):
    """Nothing gets past it; `note` says more where there is more to say."""

    note: str = ""
