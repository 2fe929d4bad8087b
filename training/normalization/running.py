"""Running statistics: what is left of their start taken out, kept from batches that are not finite, or frozen."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from training.normalization.layers import batch_norms, put_statistics, running_buffers, share_of

Snapshot = dict[str, tuple[Tensor, Tensor]]


def corrected(norm: _NormBase) -> tuple[Tensor, Tensor] | None:
    """Return mean and variance (C,) in float64 without what is left of the initial 0 and 1; None where there are none.

    With r = (1 − momentum)^n after n updates, the average is mean / (1 − r) and (variance − r) / (1 − r): Adam's
    correction (Kingma & Ba 2015, section 3), here for both. TensorFlow's `zero_debias_moving_mean` does the mean alone.
    Statistics that were never updated, or whose momentum is None (a plain average), come back as they are.
    """
    buffers = running_buffers(norm)
    if buffers is None:
        return None
    mean, variance = (buffer.detach().double() for buffer in buffers)
    share = share_of(norm)
    if share is None or share == 1:
        return mean, variance
    return mean / (1 - share), ((variance - share) / (1 - share)).clamp_min(0)  # float32 may have rounded below 0


def correct(network: nn.Module) -> None:
    """Replace the raw running statistics of every layer by the corrected ones; once, for it is no projection."""
    for _, norm in batch_norms(network):
        statistics = corrected(norm)
        if statistics is not None and share_of(norm) != 1:
            put_statistics(norm, *statistics)


@contextmanager
def correction(network: nn.Module, *, is_on: bool) -> Iterator[None]:
    """Let the network hold corrected statistics for a while; the raw ones are back afterwards, bit for bit."""
    keeper = StatisticsKeeper(network)
    if is_on:
        correct(network)
    try:
        yield
    finally:
        keeper.restore()


class StatisticsKeeper:
    """A copy of every running buffer of a network, made now and again by `keep`."""

    def __init__(self, network: nn.Module) -> None:
        names = ("running_mean", "running_var", "num_batches_tracked")
        found = (getattr(norm, name) for _, norm in batch_norms(network) for name in names)
        self._buffers = [buffer for buffer in found if isinstance(buffer, Tensor)]
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the buffers as they are now."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was kept last."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)

    @torch.no_grad()
    def is_finite(self, loss: Tensor) -> Tensor:
        """Return whether the loss and all statistics are finite, a bool on their device that nobody waited for."""
        floating = [buffer for buffer in self._buffers if buffer.is_floating_point()]
        return torch.isfinite(torch.cat([loss.detach().float().view(1), *floating])).all()


def freeze_affine(network: nn.Module) -> None:
    """Keep γ and β as they are; running statistics go on moving. Keras calls a layer so frozen `trainable = False`.

    (Keras's switch freezes the statistics too, since TensorFlow 2; here that is `freeze_statistics`.)
    """
    for _, norm in batch_norms(network):
        for parameter in norm.parameters(recurse=False):
            parameter.requires_grad = False


def freeze_gamma(network: nn.Module) -> None:
    """Keep γ as it is; β trains. In short runs the next layer's weights do γ's work (airbench does the same)."""
    for _, norm in batch_norms(network):
        if norm.weight is not None:
            norm.weight.requires_grad = False


def freeze_statistics(network: nn.Module) -> None:
    """Normalise by the running statistics and leave them alone, as Keras's `training = False`; γ and β still train.

    Lasts until the next `train()` of the network.
    """
    for _, norm in batch_norms(network):
        norm.eval()


def snapshot(network: nn.Module) -> Snapshot:
    """Return a copy of the running mean and variance of each layer."""
    found = ((name, running_buffers(norm)) for name, norm in batch_norms(network))
    return {name: (buffers[0].clone(), buffers[1].clone()) for name, buffers in found if buffers is not None}


def drift(before: Snapshot, after: Snapshot, eps: float = 1e-5) -> dict[str, tuple[float, float]]:
    """Return how far each layer's statistics moved, in its worst channel.

    The mean's way is in standard deviations as they were before; the variance's is |ln(after / before)|.
    """
    moved = {}
    for name, (mean, variance) in after.items():
        mean_before, variance_before = before[name]
        mean_way = (mean - mean_before).abs() / (variance_before + eps).sqrt()
        variance_way = ((variance + eps) / (variance_before + eps)).log().abs()
        moved[name] = float(mean_way.max()), float(variance_way.max())
    return moved
