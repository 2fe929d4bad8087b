"""A data set in its three parts, and how parts are divided. Knows no file format."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from service.preprocessing import Preprocessing
from service.wording import counted
from training.errors import DataError

TEN_DIGITS = tuple(str(digit) for digit in range(10))


class Images(Protocol):
    """uint8 (N, height, width, channels): an array in memory, or files that are decoded when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """N, height, width, channels."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Any, /) -> Any:
        """Return the pixels at a slice or at indices."""


@dataclass(frozen=True, slots=True)
class Split:
    """Images uint8 (N, height, width, channels) with targets int64 (N,), and the domain of each, int64 (N,)."""

    images: Any  # Images; numpy's own arrays are too loosely typed to be one
    targets: NDArray[np.int64]
    domains: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        """Without domains there is one."""
        if len(self.domains) != len(self.targets):
            object.__setattr__(self, "domains", np.zeros(len(self.targets), np.int64))

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: NDArray[np.int64]) -> Self:
        """Return the images at `indices`; files are not decoded for it."""
        chosen = self.images.take(indices) if hasattr(self.images, "at") else self.images[indices]
        return type(self)(chosen, self.targets[indices], self.domains[indices])

    def of_domain(self, domain: int) -> Self:
        """Return the images of one domain."""
        return self.take(np.flatnonzero(self.domains == domain))


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set in its three parts; `split` says in words how it was divided.

    `preprocessing` is what the service does to an image so that it looks like these; its mean and std are neutral.
    `skipped` are files left out because they cannot be decoded.
    """

    name: str
    labels: tuple[str, ...]
    licence: str
    split: str
    training: Split
    validation: Split
    test: Split
    preprocessing: Preprocessing
    domains: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def digest(self, *, with_test: bool = False) -> str:
        """Return the SHA-256, in hex, of what is trained and validated on: labels, targets, domains and `content`."""
        hashed = hashlib.sha256(repr((self.labels, self.domains)).encode())
        for split in (self.training, self.validation, *([self.test] if with_test else [])):
            images = split.images
            for part in (split.targets, split.domains, *(images.content() if hasattr(images, "at") else [images])):
                hashed.update(np.ascontiguousarray(part))  # type: ignore[arg-type] # an array is a buffer
        return hashed.hexdigest()

    def of_domain(self, domain: str) -> "Dataset":
        """Return the part of one domain as a data set of its own."""
        index = self.domains.index(domain)
        parts = {name: getattr(self, name).of_domain(index) for name in ("training", "validation", "test")}
        return replace(self, name=domain, split=f"{domain} of {self.name}; {self.split}", domains=(), **parts)


def neutral(mode: str, size: tuple[int, int], **rest: Any) -> Preprocessing:
    """Return a preprocessing whose mean and std say nothing yet."""
    channels = len(mode)
    return Preprocessing.model_validate(
        {"mode": mode, "size": size, "mean": (0.0,) * channels, "std": (1.0,) * channels, **rest}
    )


def checked_targets(targets: NDArray[Any], classes: int, path: Path) -> NDArray[np.int64]:
    """Return targets as int64. Raises DataError naming the file where one is not a class."""
    wide = targets.astype(np.int64)
    if len(wide) and (wide.min() < 0 or wide.max() >= classes):
        wrong = int(wide[(wide < 0) | (wide >= classes)][0])
        raise DataError(
            f"{path}: label {wrong} is out of range, there are {counted(classes, 'class')} from 0; get it again"
        )
    return wide


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Divide seeded and stratified by class: all but `count` images, and `count` images. Raises DataError."""
    if count >= len(split):
        raise DataError(f"cannot hold {counted(count, 'image')} out of {len(split):,}; set validation_images lower")
    by_rank = _stratified(split.targets, seed)
    return split.take(np.sort(by_rank[count:])), split.take(np.sort(by_rank[:count]))


def limited(split: Split, count: int, seed: int) -> Split:
    """Return at most `count` images, stratified by class; all of them where `count` is 0."""
    return split if count in {0, len(split)} or count > len(split) else hold_out(split, count, seed)[1]


def concatenated(splits: Sequence[Split]) -> Split:
    """Return the images of several splits in memory as one, a domain each."""
    return Split(
        np.concatenate([split.images for split in splits]),
        np.concatenate([split.targets for split in splits]),
        np.concatenate([np.full(len(split), index, np.int64) for index, split in enumerate(splits)]),
    )


def check_classes(split: Split, labels: Sequence[str], where: str) -> None:
    """Raise DataError where a class has no image to learn from."""
    counts = np.bincount(split.targets, minlength=len(labels))
    if (counts == 0).any():
        empty = labels[int(np.argmin(counts))]
        raise DataError(f"{where}: no training image of class {empty} is left; add images of it, or remove the class")


def _stratified(targets: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return all indices in an order whose every beginning holds each class by its share."""
    order = np.random.default_rng(seed).permutation(len(targets))
    ranks = np.empty(len(targets))
    for target in np.unique(targets):
        members = order[targets[order] == target]
        ranks[members] = (np.arange(len(members)) + 0.5) / len(members)  # evenly spread, so each class gives its share
    ordered: NDArray[np.int64] = order[np.argsort(ranks[order], kind="stable")]
    return ordered
