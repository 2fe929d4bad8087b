"""Weights, biases and factors of one layer as integers, within the bound that keeps every sum exact."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.independence.exactness.proof import LIMIT, partial_sums
from training.errors import NotConvertible

Reals = NDArray[np.float64]
MOST_BITS = 8
LARGEST_WEIGHTS = (127, 63, 31, 15, 7)  # from MOST_BITS down to 4
BIAS_SHARE = 4  # a bias may take at most this part of the bound


@dataclass(frozen=True, slots=True)
class Quantized:
    """A layer in integers: weight int8 (K, …), bias int32 (K,); one step of a sum is worth `step` (K,) real units.

    `bits` is how many the channel with the fewest has left for its weights.
    """

    weight: NDArray[np.int8]
    bias: NDArray[np.int32]
    step: Reals
    bits: int

    def real_weight(self, x_scale: float) -> Reals:
        """Return the weights that these integers stand for."""
        return self.weight * _along(self.step, self.weight) / x_scale


def quantize(
    name: str,
    weight: Reals,
    bias: Reals,
    x_scale: float,
    x_zero: int,
    *,
    shared: bool = False,
    most_bits: int = MOST_BITS,
) -> Quantized:
    """Quantize each output channel as finely as the bound allows; `shared`: all channels with one step, as logits need.

    `most_bits`, 8 to 4, is where it begins. Raises NotConvertible where 4 bits are still too many.
    """
    largest = np.abs(weight.reshape(len(weight), -1)).max(1)
    least = np.abs(bias) * BIAS_SHARE / LIMIT  # finer steps would leave the bias no room
    steps = np.zeros(len(weight))
    settled = np.zeros(len(weight), bool)
    bits = 0
    for limit in LARGEST_WEIGHTS[MOST_BITS - most_bits :]:
        tried = np.maximum(x_scale * largest / limit, least)
        tried = np.where(tried > 0, tried, x_scale)
        steps = np.where(settled, steps, tried.max() if shared else tried)
        bits = limit.bit_length() + 1
        integers, biases = _round(weight, bias, x_scale, steps)
        fits = partial_sums(integers, biases, x_zero) < LIMIT
        if fits.all():
            return Quantized(integers, biases, steps, bits)
        settled = fits & (not shared)
    channel = int(np.argmin(fits))
    raise NotConvertible(
        f"layer {name}: at {bits} bits output channel {channel} still reaches "
        f"{int(partial_sums(integers, biases, x_zero)[channel]):,}, and sums are exact below {LIMIT:,}"
    )


def _round(weight: Reals, bias: Reals, x_scale: float, steps: Reals) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
    integers = np.rint(weight * x_scale / _along(steps, weight)).astype(np.int8)
    return integers, np.rint(bias / steps).astype(np.int32)


def _along(values: Reals, weight: NDArray[np.generic]) -> Reals:
    return values.reshape(-1, *[1] * (weight.ndim - 1))


def correct_bias(weight: Reals, rounded: Reals, bias: Reals, mean: Reals, groups: int) -> Reals:
    """Return the bias that gives back what rounding the weights takes from each output's mean.

    Σ (W − Ŵ)·E[x] over an output's inputs (Nagel et al. 2019, section 4.2); weight (K, C/groups, …), mean (C,).
    """
    lost = (weight - rounded).reshape(*weight.shape[:2], -1).sum(2)  # (K, C/groups)
    per_group = mean.reshape(groups, -1)  # (groups, C/groups)
    of_group = np.repeat(per_group, len(weight) // groups, axis=0)  # (K, C/groups)
    corrected: Reals = bias + (lost * of_group).sum(1)
    return corrected
