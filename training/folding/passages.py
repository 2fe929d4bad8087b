"""What a scale and shift may pass through unchanged in effect: op(s·x + t) = s'·op(x) + t', and by which conditions.

`backward` moves a change from the output of a step to its input, `forward` the other way.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from training.folding.algebra import Affine, Array

Shape = tuple[int | None, ...]  # None for a dimension that is not a known number


class Stays(Exception):
    """Folding would be wrong, or cannot be shown to be right; the text says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """A scale and shift on its way: along `axis` of the value it is at, None for the same everywhere."""

    affine: Affine
    axis: int | None


class Passing(Protocol):
    """How one kind of step lets a change through."""

    def backward(self, change: Change) -> Change:
        """Return the change of the input that has the effect of `change` on the output. Raises Stays."""
        ...

    def forward(self, change: Change) -> Change:
        """Return the change of the output that has the effect of `change` on the input. Raises Stays."""
        ...


class _Same:
    """The same change on either side, where `check` does not object."""

    def check(self, change: Change) -> None:
        """Raise Stays where the change cannot pass."""

    def backward(self, change: Change) -> Change:
        self.check(change)
        return change

    def forward(self, change: Change) -> Change:
        self.check(change)
        return change


@dataclass(frozen=True, slots=True)
class Unchanged(_Same):
    """Identity; Dropout at inference."""


@dataclass(frozen=True, slots=True)
class Rectifier(_Same):
    """ReLU and its leaky kin: f(s·x) = s·f(x) for s ≥ 0, and nothing with a shift."""

    def check(self, change: Change) -> None:
        """Raise Stays for a shift or a negative scale."""
        if (change.affine.scale < 0).any() or change.affine.shift.any():
            raise Stays("a ReLU lies between, which only a scale without a shift passes, and no negative one")


@dataclass(frozen=True, slots=True)
class Window(_Same):
    """Pooling over the axes from 2 on. `largest`: max-pooling, which pads with −∞ and commutes with increasing maps.

    Averages whose weights do not add up to 1, because they count padded zeros, let a scale through but no shift.
    """

    largest: bool
    counts_zeros: bool = False

    def check(self, change: Change) -> None:
        """Raise Stays for what does not commute with this pooling."""
        if change.axis is not None and change.axis > 1:
            raise Stays("it works on an axis that is pooled")
        if self.largest and (change.affine.scale < 0).any():
            raise Stays("max-pooling lies between, and a scale is negative: the largest would become the smallest")
        if self.counts_zeros and change.affine.shift.any():
            raise Stays("average pooling lies between, which counts padded zeros")


@dataclass(frozen=True, slots=True)
class Reduction:
    """The mean, or the largest, over whole `axes` of a value of `rank` axes."""

    largest: bool
    axes: tuple[int, ...]
    rank: int
    keepdims: bool

    def backward(self, change: Change) -> Change:
        Window(self.largest).check(Change(change.affine, None))
        return change if change.axis is None else Change(change.affine, self._left()[change.axis])

    def forward(self, change: Change) -> Change:
        Window(self.largest).check(Change(change.affine, None))
        if change.axis is None:
            return change
        if change.axis in self.axes:
            raise Stays("it works on an axis that is averaged")
        return Change(change.affine, self._left().index(change.axis))

    def _left(self) -> list[int]:
        return [axis for axis in range(self.rank) if self.keepdims or axis not in self.axes]


@dataclass(frozen=True, slots=True)
class Transposition:
    """Axis i of the output is axis permutation[i] of the input."""

    permutation: tuple[int, ...]

    def backward(self, change: Change) -> Change:
        return change if change.axis is None else Change(change.affine, self.permutation[change.axis])

    def forward(self, change: Change) -> Change:
        return change if change.axis is None else Change(change.affine, self.permutation.index(change.axis))


@dataclass(frozen=True, slots=True)
class Regrouping:
    """Flatten, Reshape, Squeeze, Unsqueeze: the same elements in the same order, axis 0 being the same images."""

    source: Shape | None
    target: Shape | None

    def backward(self, change: Change) -> Change:
        return _regroup(change, self.target, self.source)

    def forward(self, change: Change) -> Change:
        return _regroup(change, self.source, self.target)


def _regroup(change: Change, source: Shape | None, target: Shape | None) -> Change:
    """Write the change out for every element of one image, and find the one axis of `target` it varies along."""
    if change.axis is None:
        return change
    old, new = _of_one_image(source), _of_one_image(target)
    if old is None or new is None or math.prod(old) != math.prod(new) or change.axis == 0:
        raise Stays("a reshape between shapes that are not known lies between")
    along = [-1 if axis == change.axis - 1 else 1 for axis in range(len(old))]
    scale, shift = (
        np.broadcast_to(values.reshape(along), old).reshape(new)
        for values in (change.affine.scale, change.affine.shift)
    )
    for axis in range(len(new)):
        if _varies_only_along(scale, axis) and _varies_only_along(shift, axis):
            return Change(Affine(_line(scale, axis), _line(shift, axis)), axis + 1)
    raise Stays("a reshape lies between that spreads its channels over several axes")


def _of_one_image(shape: Shape | None) -> tuple[int, ...] | None:
    known = () if shape is None else tuple(dim for dim in shape[1:] if dim)
    return known if shape and len(known) == len(shape) - 1 else None


def _line(values: Array, axis: int) -> Array:
    line: Array = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)[:, 0]
    return line


def _varies_only_along(values: Array, axis: int) -> bool:
    return bool((np.moveaxis(values, axis, -1) == _line(values, axis)).all())
