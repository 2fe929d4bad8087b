"""What a network's tensors hold on real images: samples of their values, and the mean of each channel."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.exact.executing import run, standardise
from training.exact.network import Network

FEWEST_IMAGES = 64
CHUNK = 16
SAMPLE = 16_384  # values kept of each tensor and chunk: an extreme of one value in a thousand is among them


@dataclass(slots=True)
class Observed:
    """Of one tensor: a sample of its values, its extremes, and the mean and the largest magnitude of each channel."""

    sample: NDArray[np.float32]
    low: float
    high: float
    mean: NDArray[np.float64]  # (C,)
    largest: NDArray[np.float64]  # (C,)


@dataclass(slots=True)
class _Gathering:
    """Observed, while images still come."""

    samples: list[NDArray[np.float32]] = field(default_factory=list)
    low: float = np.inf
    high: float = -np.inf
    total: Tensor | None = None
    largest: Tensor | None = None
    images: int = 0

    def add(self, values: Tensor, picks: torch.Generator) -> None:
        flat = values.reshape(-1)
        chosen = torch.randint(flat.numel(), (SAMPLE,), generator=picks) if flat.numel() > SAMPLE else slice(None)
        self.samples.append(flat[chosen].numpy().copy())
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        channels = values.transpose(0, 1).reshape(values.shape[1], -1)
        total = channels.double().mean(1) * len(values)
        largest = channels.abs().amax(1)
        self.total = total if self.total is None else self.total + total
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.images += len(values)

    def done(self) -> Observed:
        assert self.total is not None
        assert self.largest is not None
        mean = (self.total / self.images).numpy()
        return Observed(np.concatenate(self.samples), self.low, self.high, mean, self.largest.double().numpy())


@torch.no_grad()
def calibrate(
    network: Network, images: NDArray[np.uint8], report: Callable[[str, float], None] = lambda *_: None
) -> dict[str, Observed]:
    """Run images (N, height, width, channels) through the float network and return what each tensor held."""
    gathered: dict[str, _Gathering] = {}
    picks = torch.Generator().manual_seed(0)

    def observe(name: str, values: Tensor) -> Tensor:
        gathered.setdefault(name, _Gathering()).add(values, picks)
        return values

    for start in range(0, len(images), CHUNK):
        logits = run(network, standardise(network, images[start : start + CHUNK]), observe)
        observe(network.head.y, logits)
        report("calibrating", (start + CHUNK) / len(images))
    return {name: one.done() for name, one in gathered.items()}
