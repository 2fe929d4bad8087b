"""What the BatchNorm layers of a network hold: found, read, and judged by numbers alone."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from service.artifact import NormRecord


def batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield each BatchNorm layer (1d, 2d, 3d, synchronised) with its dotted name, in the order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            yield name, module


def norm_records(model: nn.Module) -> tuple[NormRecord, ...]:
    """Return the health of every BatchNorm for the manifest."""
    return tuple(_record(name, norm) for name, norm in batch_norms(model))


def initial_share(momentum: float, num_batches_tracked: int) -> float:
    """Return the share of the initial mean 0 and variance 1 that is left in the running statistics.

    Each update keeps 1 − momentum of what was there (momentum in PyTorch's sense), so n updates keep (1 − momentum)^n.
    """
    return float((1.0 - momentum) ** num_batches_tracked)


def _record(name: str, norm: _NormBase) -> NormRecord:
    counter = norm.num_batches_tracked
    count = int(counter.item()) if isinstance(counter, torch.Tensor) else None
    share = None if norm.momentum is None or count is None else initial_share(norm.momentum, count)
    return NormRecord(norm=name, eps=norm.eps, momentum=norm.momentum, num_batches_tracked=count, initial_share=share)
