"""BatchNorm over the batch of all processes, and the merging of statistics that were kept apart.

On CUDA it is torch's SyncBatchNorm. torch refuses that on the CPU, so here is one: count, mean and M2 of every process
are merged by an all-reduce through which the gradient flows back.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.normalization.layers import batch_norms, put_module, put_statistics, running_buffers, share_state
from training.normalization.moments import Moments


class SynchronizedBatchNorm(_BatchNorm):
    """BatchNorm whose statistics in training are those of all processes' batches joined; parameters as in torch.

    Arithmetic is float32 whatever the input. The running variance is unbiased over the joined count.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        if input.ndim < 2:
            raise ValueError(f"expected features (N, C, …), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Return the features (N, C, …) normalised per channel, in their own dtype."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        wide = input.float()
        count, mean, variance = _joined_statistics(wide)
        if self.track_running_stats:
            self._update(count, mean.detach(), variance.detach())
        shape = (1, -1, *[1] * (input.ndim - 2))
        scale = torch.rsqrt(variance + self.eps)
        normal = (wide - mean.to(wide.dtype).view(shape)) * scale.to(wide.dtype).view(shape)
        if self.weight is not None:
            normal = normal * self.weight.view(shape)
        if self.bias is not None:
            normal = normal + self.bias.view(shape)
        return normal.to(input.dtype)

    @torch.no_grad()
    def _update(self, count: float, mean: Tensor, variance: Tensor) -> None:
        buffers = running_buffers(self)
        assert buffers is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / max(count - 1, 1))
        for buffer, new in zip(buffers, (mean, unbiased), strict=True):
            buffer.mul_(1 - factor).add_(new.to(buffer.dtype), alpha=factor)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is the sum of all processes' gradients, since every loss depends on every input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total


def _sum_over_processes(values: Tensor) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(values)  # type: ignore[no-untyped-call] # torch leaves it untyped
    return total


def _joined_statistics(features: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the joined count, and mean and biased variance (C,) in float64, differentiable."""
    axes = [axis for axis in range(features.ndim) if axis != 1]
    count = features.numel() // features.shape[1]
    variance, mean = torch.var_mean(features, dim=axes, correction=0)
    mean, m2 = mean.double(), variance.double() * count
    first = _sum_over_processes(torch.cat([mean * count, mean.new_tensor([count])]))
    total = float(first[-1].detach())
    joined = first[:-1] / total
    joined_m2 = _sum_over_processes(m2 + count * (mean - joined).square())
    return total, joined, joined_m2 / total


def synchronize(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network with every BatchNorm seeing all processes; names in the state stay as they were."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return converted
    for name, norm in list(batch_norms(network)):
        network = put_module(network, name, _synchronized(norm))
    return network


def _synchronized(norm: _BatchNorm) -> SynchronizedBatchNorm:
    twin = SynchronizedBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    share_state(norm, twin)
    return twin.train(norm.training)


def keep_whole(network: nn.Module) -> None:
    """Let torch.compile go around synchronised layers: what they ask of other processes is no part of a graph."""
    for norm in _synchronised(network):
        norm.forward = torch.compiler.disable(norm.forward)  # type: ignore[no-untyped-call]


def set_apart(network: nn.Module) -> None:
    """Let synchronised layers ask nothing of other processes: they normalise by their running statistics.

    Lasts until the next `train()` of the network.
    """
    for norm in _synchronised(network):
        norm.eval()


def _synchronised(network: nn.Module) -> list[nn.Module]:
    return [norm for norm in network.modules() if isinstance(norm, SynchronizedBatchNorm | nn.SyncBatchNorm)]


def merge_processes(moments: Moments) -> Moments:
    """Return the moments of all processes' values together, the same bits everywhere."""
    if not distributed.is_initialized():
        return moments
    counts = moments.mean.new_full((1,), moments.count)
    mine = torch.cat([counts, moments.mean, moments.m2])
    parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, mine)
    channels = len(moments.mean)
    gathered = [Moments(int(part[0]), part[1 : 1 + channels], part[1 + channels :]) for part in parts]
    merged = gathered[0]
    for one in gathered[1:]:
        merged = merged.merged(one)
    return merged


@torch.no_grad()
def merge_running_statistics(network: nn.Module) -> None:
    """Give every process the running statistics of all: equal weights, and the spread between the means counts.

    Averaging the variances alone, as is common, loses that spread.
    """
    for _, norm in batch_norms(network):
        buffers = running_buffers(norm)
        if buffers is None:
            continue
        mean, variance = (buffer.double() for buffer in buffers)
        joined = _average(mean)
        put_statistics(norm, joined, _average(variance + (mean - joined).square()))


def _average(values: Tensor) -> Tensor:
    total = values.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
