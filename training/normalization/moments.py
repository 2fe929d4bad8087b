"""Count, mean and summed squared deviation per channel in float64, merged without loss over unequal parts."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Of `count` values per channel: mean (C,) and m2 (C,), the sum of squared deviations from it, float64."""

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Return the moments of features (N, C, …) over every axis but the channels'."""
        by_channel = features.detach().double().transpose(0, 1).flatten(1)  # (N, C, …) → (C, N·…)
        variance, mean = torch.var_mean(by_channel, dim=1, correction=0)
        count = by_channel.shape[1]
        return cls(count, mean, variance * count)

    def merged(self, other: Self) -> Self:
        """Return the moments of both together: Chan, Golub and LeVeque 1979, equation 2.1, free of cancellation.

        The spread between the two means counts too (the law of total variance), so batches need not be alike.
        """
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return type(self)(count, mean, m2)

    @property
    def variance(self) -> Tensor:
        """Unbiased over all values together, as torch keeps running_var; 0 for a single value."""
        return self.m2 / max(self.count - 1, 1)

    def is_finite(self) -> bool:
        """True where no channel is NaN or infinite."""
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.m2).all())
