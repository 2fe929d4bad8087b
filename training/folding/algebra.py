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


def fold_into_conv(
    weight: ArrayLike, bias: ArrayLike | None, norm: Norm, *, transposed: bool = False, groups: int = 1
) -> tuple[Array, Array]:
    """Return weight and bias of a convolution equal to `norm(conv(x))` at inference.

    W' = s·W and b' = s·b + t on the output axis, all in float64. A missing bias is 0.

    Shapes: weight (K, C/groups, *kernel), or (C, K/groups, *kernel) when transposed; bias and statistics (K,).
    Raises NotFoldable for unusable statistics, or when their number is not K.
    """
    weight = np.asarray(weight, np.float64)
    scale, shift = norm.scale_and_shift()
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if len(scale) != outputs:
        raise NotFoldable(f"{len(scale)} statistics for {outputs} output channels")
    folded_bias = shift if bias is None else scale * np.asarray(bias, np.float64) + shift
    if not transposed:
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), folded_bias
    inputs, per_group, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, per_group, *kernel)
    by_group = scale.reshape(groups, 1, per_group, *[1] * len(kernel))  # a group's outputs have scales of their own
    return (grouped * by_group).reshape(weight.shape), folded_bias


def fold_into_linear(weight: ArrayLike, bias: ArrayLike | None, norm: Norm) -> tuple[Array, Array]:
    """Return weight and bias of a linear layer equal to `norm(linear(x))` for x of shape (N, C).

    Shapes: weight (K, C), bias and statistics (K,). Raises NotFoldable as `fold_into_conv` does.
    """
    return fold_into_conv(weight, bias, norm)


def _first(condition: NDArray[np.bool_]) -> int:
    return int(np.argmax(condition))
