"""What the BatchNorm layers of a network hold: found, read, and judged by numbers alone."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from service.manifest import NormRecord

# raw: the moving averages as training leaves them; corrected: without what is left of their start; population: of all
# images together. `running` is what raw was called in checkpoints of schema 1.
Statistics = Literal["raw", "corrected", "population"]


def batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield each BatchNorm layer (1d, 2d, 3d, synchronised) with its dotted name, in the order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            yield name, module


def put_module(network: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` in the place of the one with a dotted name; return the network, or `module` for the empty name."""
    parent, _, child = name.rpartition(".")
    if not child:
        return module
    setattr(network.get_submodule(parent), child, module)
    return network


def taken_apart(network: nn.Module) -> nn.Module:
    """Replace each BatchNorm that also drops and activates by a plain one with what follows it; parameters are shared.

    timm's BatchNormAct2d is a BatchNorm whose `forward` goes on with its children `drop` and `act`; synchronizing it
    would lose both.
    """
    for name, norm in list(batch_norms(network)):
        following = OrderedDict(norm.named_children())
        if following and following.keys() <= {"drop", "act"}:
            kept = {child: one for child, one in following.items() if not isinstance(one, nn.Identity)}
            plain = _plain(norm)
            network = put_module(network, name, nn.Sequential(OrderedDict(norm=plain, **kept)) if kept else plain)
    return network


def _plain(norm: _BatchNorm) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    share_state(norm, plain)
    return plain.train(norm.training)


def share_state(norm: _BatchNorm, twin: _BatchNorm) -> None:
    """Let `twin` hold the very parameters and buffers of `norm`."""
    for name, value in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
        setattr(twin, name, value)


def norm_records(model: nn.Module, statistics: Statistics = "raw") -> tuple[NormRecord, ...]:
    """Return the health of every BatchNorm for the manifest; only raw statistics hold a share of their start."""
    return tuple(_record(name, norm, statistics) for name, norm in batch_norms(model))


def initial_share(momentum: float, num_batches_tracked: int) -> float:
    """Return the share of the initial mean 0 and variance 1 that is left in the running statistics.

    Each update keeps 1 − momentum of what was there (momentum in PyTorch's sense), so n updates keep (1 − momentum)^n.
    """
    return float((1.0 - momentum) ** num_batches_tracked)


def share_of(norm: _NormBase) -> float | None:
    """Return what is left of the initial statistics in a layer that holds raw ones, None where nobody can tell."""
    count = count_of(norm)
    return None if norm.momentum is None or count is None else initial_share(norm.momentum, count)


def count_of(norm: _NormBase) -> int | None:
    """Return the number of batches that updated the running statistics, None where they are not counted."""
    counter = norm.num_batches_tracked
    return int(counter.item()) if isinstance(counter, Tensor) else None


def running_buffers(norm: _NormBase) -> tuple[Tensor, Tensor] | None:
    """Return running mean and variance themselves, (C,), None where the layer keeps none."""
    if not isinstance(norm.running_mean, Tensor) or not isinstance(norm.running_var, Tensor):
        return None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def put_statistics(norm: _NormBase, mean: Tensor, variance: Tensor) -> None:
    """Write statistics (C,) of any dtype into the running buffers; the layer counts as updated from then on."""
    buffers = running_buffers(norm)
    assert buffers is not None
    buffers[0].copy_(mean)
    buffers[1].copy_(variance)
    if isinstance(norm.num_batches_tracked, Tensor):
        norm.num_batches_tracked.clamp_(min=1)


def _record(name: str, norm: _NormBase, statistics: Statistics) -> NormRecord:
    share = share_of(norm) if statistics == "raw" else 0.0
    return NormRecord(
        norm=name, eps=norm.eps, momentum=norm.momentum, num_batches_tracked=count_of(norm), initial_share=share
    )
