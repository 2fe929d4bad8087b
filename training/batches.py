"""Which images are in which training batch, and their pixels on the device. Knows no network.

Every random number follows from the run's seed, the epoch, the step and the process, so that a run goes on from any
step as if it had never stopped, and several processes change an image as one would.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training import augmentation, distributed
from training.augmentation import Jitter
from training.config import TrainConfig
from training.data import Split
from training.data.decoding import ImageFiles, stream, worker_count
from training.errors import UsageError

EVALUATION_BATCH = 1000
ALTERNATING = 2**31  # beside the seed: no epoch has this number
SHARED_MIXED = -1  # the domain of a batch that comes from several


@dataclass(frozen=True, slots=True)
class Batch:
    """One process's part of a micro-batch: images (n, channels, height, width), targets (n,), one domain or mixed."""

    images: Tensor
    targets: Tensor
    domain: int


@dataclass(frozen=True, slots=True)
class Planned:
    """A batch as indices into a split, all of one domain or mixed."""

    indices: NDArray[np.int64]
    domain: int


class Batches:
    """A split on its device: images uint8 (N, channels, height, width), targets int64 (N,); or files that stream."""

    def __init__(
        self, images: Tensor | ImageFiles, targets: Tensor, domains: NDArray[np.int64] | None = None, workers: int = 0
    ) -> None:
        self.images = images
        self.targets = targets
        self.domains = np.zeros(len(targets), np.int64) if domains is None else domains
        self.workers = workers

    @classmethod
    def on(cls, device: torch.device, split: Split, workers: int = 0) -> "Batches":
        """Move a split to the device once; files stay where they are."""
        targets = torch.from_numpy(split.targets).to(device)
        if isinstance(split.images, ImageFiles):
            return cls(split.images, targets, split.domains, worker_count(workers))
        return cls(_to_device(split.images, device), targets, split.domains)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def device(self) -> torch.device:
        """Where the targets are, and the images once they are asked for."""
        return self.targets.device

    def fetch(self, order: list[NDArray[np.int64]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and targets of each batch of indices, on the device."""
        if isinstance(self.images, ImageFiles):
            pixels = stream(self.images, order, workers=self.workers)
            for indices, chunk in zip(order, pixels, strict=True):
                yield _to_device(chunk, self.device), self.targets[torch.from_numpy(indices).to(self.device)]
            return
        for indices in order:
            chosen = torch.from_numpy(indices).to(self.device)
            yield self.images[chosen], self.targets[chosen]

    def in_order(self, domain: int | None = None, count: int | None = None) -> list[NDArray[np.int64]]:
        """Return this process's share of the indices, of one domain where given, in batches for evaluation."""
        indices = np.arange(len(self)) if domain is None else np.flatnonzero(self.domains == domain)
        mine = indices[:count][distributed.rank() :: distributed.world_size()]
        return [mine[start : start + EVALUATION_BATCH] for start in range(0, len(mine), EVALUATION_BATCH)]


def plan(domains: NDArray[np.int64], config: TrainConfig, epoch: int) -> list[Planned]:
    """Return an epoch's batches; a last partial one is dropped: BatchNorm would learn from a few images.

    Of several domains each gives as many images as the largest has, the smaller ones in new orders again and again.
    """
    generator = np.random.default_rng([config.seed, epoch])
    size = config.batch_size
    if config.domains == "union":
        order = generator.permutation(np.concatenate(_balanced(domains, generator)))
        return [Planned(order[start : start + size], SHARED_MIXED) for start in range(0, len(order) - size + 1, size)]
    batches = [
        Planned(order[start : start + size], domain)
        for domain, order in enumerate(_balanced(domains, generator))
        for start in range(0, len(order) - size + 1, size)
    ]
    return [batches[index] for index in generator.permutation(len(batches))]


def steps_per_epoch(images: int, config: TrainConfig) -> int:
    """Return the number of whole batches of one domain. Raises UsageError."""
    if images < config.batch_size:
        raise UsageError(f"batch_size = {config.batch_size}: there are only {images} training images; set it lower")
    return images // config.batch_size


def epoch_steps(batches: Batches, config: TrainConfig) -> int:
    """Return the number of steps of an epoch. Raises UsageError where there is not one."""
    sizes = np.bincount(batches.domains)
    if config.domains == "union":
        return steps_per_epoch(int(sizes.max()) * len(sizes), config)
    return len(sizes) * steps_per_epoch(int(sizes.max()), config)


def training_batches(
    batches: Batches, config: TrainConfig, epoch: int, first_step: int = 0
) -> Iterator[tuple[int, list[Batch]]]:
    """Yield each step's number, from 0, and its micro-batches: this process's part of them, augmented."""
    planned = plan(batches.domains, config, epoch)[first_step:]
    parts = [(step, part) for step, one in enumerate(planned, first_step) for part in _micro(one, config)]
    fetched = batches.fetch([_mine(part.indices) for _, part in parts])
    mirrored = _mirrored(len(batches), config, epoch)
    for step in range(first_step, first_step + len(planned)):
        generator = seeded(config.seed, epoch, step)
        micro = []
        for _, part in parts[(step - first_step) * config.accumulate : (step - first_step + 1) * config.accumulate]:
            images, targets = next(fetched)
            turned = None if mirrored is None else mirrored[torch.from_numpy(part.indices)]
            changed = _augmented(images, len(part.indices), config, generator, turned)
            micro.append(Batch(changed, targets, part.domain))
        yield step, micro


def seeded(*numbers: int) -> torch.Generator:
    """Return a generator that depends on all of the numbers; neighbours have nothing in common."""
    return torch.Generator().manual_seed(seed_of(*numbers))


def seed_of(*numbers: int) -> int:
    """Return one seed for several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _micro(planned: Planned, config: TrainConfig) -> list[Planned]:
    return [Planned(indices, planned.domain) for indices in np.split(planned.indices, config.accumulate)]


def _mine(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    return indices[_share(len(indices))]


def _share(count: int) -> slice:
    each = count // distributed.world_size()
    return slice(distributed.rank() * each, (distributed.rank() + 1) * each)


def _augmented(
    images: Tensor, whole: int, config: TrainConfig, generator: torch.Generator, mirrored: Tensor | None
) -> Tensor:
    is_drawn = config.flip and mirrored is None
    largest = Jitter(config.translate, config.rotate, config.scale, is_drawn, config.cutout)
    changes = augmentation.draw(whole, images.shape[-2:], largest, generator)
    if mirrored is not None:
        changes = replace(changes, mirrored=mirrored)
    return augmentation.apply(images, changes.take(_share(whole)))


def _mirrored(count: int, config: TrainConfig, epoch: int) -> Tensor | None:
    """Return which of all images are mirrored in this epoch, (count,), None where each batch draws that anew.

    airbench's alternating flip (Jordan 2024, arXiv 2404.00498): two epochs show both sides of every image.
    """
    if not (config.flip and config.alternate_flip):
        return None
    coins = torch.rand(count, generator=seeded(config.seed, ALTERNATING)) < 0.5
    return coins if epoch % 2 else ~coins


def _balanced(domains: NDArray[np.int64], generator: np.random.Generator) -> list[NDArray[np.int64]]:
    members = [np.flatnonzero(domains == domain) for domain in range(int(domains.max()) + 1)]
    largest = max(len(one) for one in members)
    orders = []
    for one in members:
        rounds = [generator.permutation(one) for _ in range(-(-largest // len(one)))]
        orders.append(np.concatenate(rounds)[:largest])
    return orders


def _to_device(images: Any, device: torch.device) -> Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)  # (N, H, W, C) → (N, C, H, W)
    return pixels.contiguous().to(device, non_blocking=True)
