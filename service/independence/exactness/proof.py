"""The proof of exactness, from the file alone.

Theorem. Let every sum of a model be one of integers whose partial sums, in any order, stay below 2²⁴ in magnitude,
and let everything else be exact or one correctly rounded operation. Then float32, int32, float64 and TF32 products
with a 24-bit accumulator give the same bits, whatever the batch, slot, threads, tiling or kernel, as long as the
kernel sums products. What the theorem presumes of a kernel is not in the file; the probe looks at that.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.errors import NotExact
from service.integers import Convolution, Head, Pair, Steps
from service.integers.steps import BYTE

THEOREM_VERSION = 1
LIMIT = 2**24  # float32 holds every integer up to here
LARGEST_EXPONENT = 40  # of a power of two; three of them together stay far from the ends of float32
SMALLEST_FACTOR = 2.0**-100  # a product with it stays clear of subnormal numbers, which some devices flush to 0


@dataclass(frozen=True, slots=True)
class LayerBound:
    """How large a partial sum of a layer can be, at its worst output channel; `headroom_bits` is what is left of 24."""

    name: str
    terms: int  # products in a sum
    bound: int
    headroom_bits: float


@dataclass(frozen=True, slots=True)
class Exactness:
    """What was proved: the layers that sum products, each with its bound."""

    layers: tuple[LayerBound, ...]

    @property
    def tightest(self) -> LayerBound:
        """The layer with the least headroom."""
        return min(self.layers, key=lambda layer: layer.headroom_bits)


def prove_exact(steps: Steps) -> Exactness:
    """Return the bounds of every layer. Raises NotExact with the layer that breaks one."""
    for step in steps.steps:
        if isinstance(step, Pair):
            _check_pair(step)
        if isinstance(step, Convolution | Head):
            _check_factor(step)
    return Exactness(tuple(_bounds(steps)))


def partial_sums(weight: NDArray[np.int8], bias: NDArray[np.int32], x_zero: int) -> NDArray[np.int64]:
    """Return for each output channel the largest magnitude of any partial sum, the bias included; weight (K, …).

    With x − x_zero between −x_zero and 255 − x_zero, the terms that lift a sum add up to `high`, those that lower it to
    `low`; a partial sum in any order lies between, and the bias may come first or last.
    """
    flat = weight.reshape(len(weight), -1).astype(np.int64)
    lifting, lowering = np.maximum(flat, 0).sum(1), np.maximum(-flat, 0).sum(1)
    above = BYTE - x_zero
    high, low = above * lifting + x_zero * lowering, above * lowering + x_zero * lifting
    sums: NDArray[np.int64] = np.maximum(high, low) + np.abs(bias.astype(np.int64))
    return sums


def _bounds(steps: Steps) -> Iterator[LayerBound]:
    for step in steps.products():
        weight = step.weight.T if isinstance(step, Head) else step.weight
        sums = partial_sums(weight, step.bias, step.x_zero)
        bound, channel = int(sums.max()), int(sums.argmax())
        if bound >= LIMIT:
            raise NotExact(
                f"node {step.name}: output channel {channel} can reach {bound:,}, and sums are exact below {LIMIT:,}"
            )
        yield LayerBound(step.name, int(np.prod(weight.shape[1:])), bound, 24 - math.log2(max(1, bound)))


def _check_factor(step: Convolution | Head) -> None:
    factor = step.factor if isinstance(step, Convolution) else step.scale
    if not (np.isfinite(factor).all() and (factor >= SMALLEST_FACTOR).all()):
        raise NotExact(f"node {step.name}: its factors are not all finite and at least 2^-100")


def _check_pair(step: Pair) -> None:
    """Powers of two shift, which is exact; even zero points keep ties where they are when runtimes add them early."""
    operands = (step.a, step.b, step.y)
    for operand in operands:
        if math.frexp(operand.scale)[0] != 0.5 or abs(math.frexp(operand.scale)[1]) > LARGEST_EXPONENT:
            raise NotExact(f"node {step.name}: the scale {operand.scale} of {operand.tensor} is no usable power of two")
        if operand.zero % 2:
            raise NotExact(f"node {step.name}: the zero point {operand.zero} of {operand.tensor} is odd")
    if _bits(step) > 24:
        raise NotExact(f"node {step.name}: its scales lie so far apart that {_bits(step)} bits are needed")


def _bits(step: Pair) -> int:
    """Return how many bits the sum or product needs before it is rounded; an operand has 8 and a sign.

    In steps of y as well: runtimes that fuse a pair round and clip it together with the zero point of y.
    """
    a, b, y = (math.frexp(operand.scale)[1] for operand in (step.a, step.b, step.y))
    if step.operation == "Mul":
        return 18 + max(0, a + b - 1 - y)
    return 10 + max(a, b, y) - min(a, b, y)
