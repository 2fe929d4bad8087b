"""Population statistics: mean and variance of every BatchNorm's input over many images, not a moving average.

The "precise BatchNorm" of Wu & Johnson 2021 (arXiv 2105.07576), with three differences from the usual implementations:
float64 instead of E[x²] − E[x]² in float32, batches of unequal size weighed by it, and the spread between batch means
counted, without which class-sorted batches give too small a variance.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.errors import RunError
from training.normalization.layers import batch_norms, put_statistics, running_buffers
from training.normalization.moments import Moments


@torch.no_grad()
def estimate(
    network: nn.Module, batches: Iterable[Tensor], merge: Callable[[Moments], Moments] = lambda moments: moments
) -> None:
    """Write into every BatchNorm the statistics of its input over all batches (N, C, …) together.

    As in training each layer normalises by its batch while it is measured; dropout is off, and nothing is written
    before the last batch. `merge` joins one layer's moments with those of other processes.

    Raises RunError naming a layer whose input is not finite; then nothing was written.
    """
    seen = _measure(network, batches)
    merged = {norm: merge(moments) for norm, moments in seen.items()}
    for name, norm in batch_norms(network):
        if norm in merged and not merged[norm].is_finite():
            raise RunError(f"BatchNorm {name} has an input that is not finite; population statistics need finite ones")
    for norm, moments in merged.items():
        put_statistics(norm, moments.mean, moments.variance)


def _measure(network: nn.Module, batches: Iterable[Tensor]) -> dict[_BatchNorm, Moments]:
    seen: dict[_BatchNorm, Moments] = {}

    def collect(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        moments = Moments.of(inputs[0])
        seen[norm] = seen[norm].merged(moments) if norm in seen else moments

    norms = [norm for _, norm in batch_norms(network) if running_buffers(norm) is not None]
    hooks = [norm.register_forward_pre_hook(collect) for norm in norms]
    try:
        with _batch_statistics(network, norms):
            for images in batches:
                network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def _batch_statistics(network: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Normalise by batch statistics without touching running ones; everything else is in evaluation mode."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for module, mode in modes.items():
            module.training = mode
