"""The arithmetic of extents that may contain the batch size N, which is any positive integer.

An extent is an `int`; a `Times(k)`, which is k·N; FREE, an unknown number that is the same for every batch;
or TIED, a number that varies with N in a way not followed. Operations never guess: what they cannot express
becomes FREE or TIED. Truth values are extents too (a bool is an int), so that comparisons of shapes can steer
a Where.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Unknown(Enum):
    """Numbers that are not known."""

    FREE = "free"
    TIED = "tied"


FREE = Unknown.FREE
TIED = Unknown.TIED


@dataclass(frozen=True, slots=True)
class Times:
    """`factor` · N, with factor ≥ 1."""

    factor: int


Extent = int | Times | Unknown
Dim = int | None
"""An extent within one image: a number, or None where the file leaves it open. Never depends on N."""


def varies(extent: Extent) -> bool:
    """Whether the extent depends on the batch size."""
    return isinstance(extent, Times) or extent is TIED


def from_dim(dim: Dim) -> Extent:
    """A per-image extent as an extent."""
    return FREE if dim is None else dim


def product(dims: Iterable[Dim]) -> Dim:
    """The product of per-image extents, None as soon as one is unknown."""
    known: list[int] = []
    for dim in dims:
        if dim is None:
            return None
        known.append(dim)
    return math.prod(known)


def blur(*extents: Extent) -> Extent:
    """All that is known of a number computed from these in some way not followed."""
    return TIED if any(varies(extent) for extent in extents) else FREE


def add(a: Extent, b: Extent) -> Extent:
    """A + b."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if isinstance(a, Times) and isinstance(b, Times):
        return Times(a.factor + b.factor)
    if a == 0:
        return b
    return a if b == 0 else blur(a, b)


def subtract(a: Extent, b: Extent) -> Extent:
    """A − b."""
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    if isinstance(a, Times) and isinstance(b, Times):
        gap = a.factor - b.factor
        return Times(gap) if gap > 0 else TIED if gap else 0
    return a if b == 0 else blur(a, b)


def multiply(a: Extent, b: Extent) -> Extent:
    """A · b."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if 0 in (a, b):
        return 0
    for one, other in ((a, b), (b, a)):
        if one == 1:
            return other
        if isinstance(one, Times) and isinstance(other, int) and other > 0:
            return Times(one.factor * other)
    return blur(a, b)


def divide(a: Extent, b: Extent) -> Extent:
    """A / b as ONNX divides integers, towards zero; followed only where the division is exact or no N is
    left.
    """
    if isinstance(a, int) and isinstance(b, int) and b != 0:
        return int(math.copysign(abs(a) // abs(b), a * b)) if a else 0
    if b == 1:
        return a
    if isinstance(a, Times) and isinstance(b, int) and b > 0 and a.factor % b == 0:
        return Times(a.factor // b)
    if isinstance(a, Times) and isinstance(b, Times):
        return a.factor // b.factor  # the N in both cancels, and ⌊kN / jN⌋ = ⌊k / j⌋
    return blur(a, b)


def remainder(a: Extent, b: Extent) -> Extent:
    """A mod b, for non-negative a."""
    if isinstance(a, int) and isinstance(b, int) and a >= 0 and b > 0:
        return a % b
    if isinstance(a, Times) and isinstance(b, int) and b > 0 and a.factor % b == 0:
        return 0
    return blur(a, b)


def less(a: Extent, b: Extent) -> Extent:
    """Whether a < b for every N."""
    return negate(at_most(b, a))


def at_most(a: Extent, b: Extent) -> Extent:
    """Whether a ≤ b for every N; a bool only where the answer is the same for all of them."""
    if isinstance(a, int) and isinstance(b, int):
        return a <= b
    if isinstance(a, Times) and isinstance(b, Times):
        return a.factor <= b.factor
    if isinstance(a, int) and isinstance(b, Times) and a <= b.factor:
        return True
    if isinstance(a, Times) and isinstance(b, int) and b < a.factor:
        return False
    return blur(a, b)


def equal(a: Extent, b: Extent) -> Extent:
    """Whether a = b for every N."""
    if isinstance(a, int | Times) and isinstance(b, int | Times):
        if type(a) is type(b) or not (isinstance(a, Times) or isinstance(b, Times)):
            return a == b
        if True in (less(a, b), less(b, a)):
            return False
    return blur(a, b)


def maximum(a: Extent, b: Extent) -> Extent:
    """The larger of both."""
    if at_most(a, b) is True:
        return b
    return a if at_most(b, a) is True else blur(a, b)


def minimum(a: Extent, b: Extent) -> Extent:
    """The smaller of both."""
    if at_most(a, b) is True:
        return a
    return b if at_most(b, a) is True else blur(a, b)


def negate(a: Extent) -> Extent:
    """Whether a truth value is false."""
    return not a if isinstance(a, int) else a


def both(a: Extent, b: Extent) -> Extent:
    """Whether two truth values are true."""
    if isinstance(a, int) and isinstance(b, int):
        return bool(a and b)
    return False if False in (a, b) else blur(a, b)


def choose(condition: Extent, a: Extent, b: Extent) -> Extent:
    """A where the condition is true, else b."""
    if isinstance(condition, int):
        return a if condition else b
    return blur(condition, a, b)
