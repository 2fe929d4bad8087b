"""The mathematics of folding, on float64 arrays. Knows no framework.

At inference BatchNorm is norm(y) = s·y + t on each channel, with s = γ/√(σ² + eps) and t = β − μ·s
(Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 2, step 11), so a linear layer before it can take it in.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.errors import NotFoldable

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """The statistics of one BatchNorm: arrays (K,); `weight` γ and `bias` β are None where the layer has none."""

    running_mean: Array
    running_var: Array
    eps: float
    weight: Array | None = None
    bias: Array | None = None

    def scale_and_shift(self) -> tuple[Array, Array]:
        """Return s and t of norm(y) = s·y + t, each (K,).

        Raises NotFoldable when a statistic is not finite, a variance is negative, or σ² + eps is 0.
        """
        given = {"running_mean": self.running_mean, "running_var": self.running_var}
        given |= {"weight": self.weight, "bias": self.bias}  # type: ignore[dict-item] # None is skipped below
        for name, values in given.items():
            if values is not None and not np.isfinite(values).all():
                raise NotFoldable(f"{name} is not finite in channel {_first(~np.isfinite(values))}")
        if (self.running_var < 0).any():
            raise NotFoldable(f"running_var is negative in channel {_first(self.running_var < 0)}")
        variance = self.running_var + self.eps
        if (variance == 0).any():
            raise NotFoldable(f"running_var + eps is 0 in channel {_first(variance == 0)}")
        scale = 1 / np.sqrt(variance) if self.weight is None else self.weight / np.sqrt(variance)
        shift = -self.running_mean * scale
        return scale, shift if self.bias is None else shift + self.bias


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """y = scale·x + shift on each channel: arrays (C,), or (1,) where every channel gets the same."""

    scale: Array
    shift: Array

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return bool((self.scale == 1).all() and (self.shift == 0).all())

    @property
    def is_uniform(self) -> bool:
        """Whether every channel gets the same."""
        return len(self.scale) == 1

    def then(self, later: "Affine") -> "Affine":
        """Return later(self(x)) as one."""
        scale, shift = np.broadcast_arrays(later.scale * self.scale, later.scale * self.shift + later.shift)
        return Affine(scale, shift)

    def over(self, channels: int, layer: str = "the layer") -> "Affine":
        """Return it with one entry for each of `channels`. Raises NotFoldable when there is another number."""
        if self.is_uniform:
            return Affine(np.repeat(self.scale, channels), np.repeat(self.shift, channels))
        if len(self.scale) != channels:
            raise NotFoldable(f"{len(self.scale)} statistics for {channels} channels of {layer}")
        return self

    def part(self, start: int, stop: int) -> "Affine":
        """Return it for the channels from `start` to before `stop`."""
        return self if self.is_uniform else Affine(self.scale[start:stop], self.shift[start:stop])


def fold_into_conv(
    weight: ArrayLike, bias: ArrayLike | None, norm: Norm, *, transposed: bool = False, groups: int = 1
) -> tuple[Array, Array]:
    """Return weight and bias of a convolution equal to `norm(conv(x))` at inference.

    W' = s·W and b' = s·b + t on the output axis, all in float64. A missing bias is 0.

    Shapes: weight (K, C/groups, *kernel), or (C, K/groups, *kernel) when transposed; bias and statistics (K,).
    Raises NotFoldable for unusable statistics, or when their number is not K.
    """
    return affine_after(weight, bias, Affine(*norm.scale_and_shift()), transposed=transposed, groups=groups)


def affine_after(
    weight: ArrayLike, bias: ArrayLike | None, affine: Affine, *, transposed: bool = False, groups: int = 1
) -> tuple[Array, Array]:
    """Return weight and bias of a layer equal to `affine(layer(x))`; shapes as in `fold_into_conv`.

    A linear layer is a convolution without a kernel: weight (K, C).
    """
    weight = np.asarray(weight, np.float64)
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if len(affine.scale) != outputs:
        raise NotFoldable(f"{len(affine.scale)} statistics for {outputs} output channels")
    scale = affine.scale
    folded_bias = affine.shift if bias is None else scale * np.asarray(bias, np.float64) + affine.shift
    if not transposed:
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), folded_bias
    inputs, per_group, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, per_group, *kernel)
    by_group = scale.reshape(groups, 1, per_group, *[1] * len(kernel))  # a group's outputs have scales of their own
    return (grouped * by_group).reshape(weight.shape), folded_bias


def affine_before(
    weight: ArrayLike, bias: ArrayLike | None, affine: Affine, *, transposed: bool = False, groups: int = 1
) -> tuple[Array, Array | None]:
    """Return weight and bias of a layer equal to `layer(affine(x))`, where no zero is padded or the shift is 0.

    W' = W·s on the input axis, b' = b + Σ W·t over input channels and kernel. At the border of a transposed
    convolution fewer inputs meet an output, so there the shift must be 0. A missing bias stays missing where t is 0.

    Shapes: as in `fold_into_conv`; affine over the C input channels. Raises NotFoldable for another number.
    """
    weight = np.asarray(weight, np.float64)
    folded_bias = None if bias is None else np.asarray(bias, np.float64)
    inputs = weight.shape[0] if transposed else weight.shape[1] * groups
    affine = affine.over(inputs)
    if transposed:
        if affine.shift.any():
            raise NotFoldable("a shift before a transposed convolution reaches its border unevenly")
        return weight * affine.scale.reshape(-1, *[1] * (weight.ndim - 1)), folded_bias
    outputs, per_group, *kernel = weight.shape
    shape = (outputs, per_group, *[1] * len(kernel))
    scale, shift = (
        np.repeat(values.reshape(groups, per_group), outputs // groups, axis=0).reshape(shape)
        for values in (affine.scale, affine.shift)
    )
    if affine.shift.any():
        added = (weight * shift).reshape(outputs, -1).sum(axis=1)
        folded_bias = added if folded_bias is None else folded_bias + added
    return weight * scale, folded_bias


def fold_into_linear(weight: ArrayLike, bias: ArrayLike | None, norm: Norm) -> tuple[Array, Array]:
    """Return weight and bias of a linear layer equal to `norm(linear(x))` for x of shape (N, C).

    Shapes: weight (K, C), bias and statistics (K,). Raises NotFoldable as `fold_into_conv` does.
    """
    return fold_into_conv(weight, bias, norm)


def _first(condition: NDArray[np.bool_]) -> int:
    return int(np.argmax(condition))
