"""Arithmetic with constants as a scale and shift: what Keras and others leave of a BatchNorm."""

import numpy as np

from training.folding.algebra import Affine, Array
from training.folding.passages import Shape, Stays


def affine_of(kind: str, values: Array, *, swapped: bool) -> Affine:
    """Return x·c, x/c, x + c or x − c, and with `swapped` c − x, as a scale and shift. Raises Stays.

    `kind` is "Mul", "Div", "Add" or "Sub".
    """
    ones, zeros = np.ones_like(values), np.zeros_like(values)
    if not np.isfinite(values).all() or (kind == "Div" and (swapped or not values.all())):
        raise Stays("a division, or arithmetic with numbers that are not finite")
    if kind in {"Mul", "Div"}:
        return Affine(values if kind == "Mul" else 1 / values, zeros)
    if kind == "Add":
        return Affine(ones, values)
    return Affine(-ones, values) if swapped else Affine(ones, -values)


def per_channel(constant: Array, shape: Shape | None) -> tuple[Array, int | None]:
    """Return a constant as one entry for each channel with their axis, None for one number. Raises Stays."""
    if constant.ndim <= 1 and constant.size == 1:
        return constant.reshape(1), None
    wide = [axis for axis, size in enumerate(constant.shape) if size != 1]
    if shape is None or constant.ndim > len(shape) or len(wide) > 1 or constant.size == 0:
        raise Stays("arithmetic with a constant that is not one number for each channel")
    if not wide:
        return constant.reshape(1), None
    axis = len(shape) - constant.ndim + wide[0]
    if shape[axis] != constant.size or axis == 0:
        raise Stays("arithmetic with a constant that is not one number for each channel")
    return constant.reshape(-1), axis
