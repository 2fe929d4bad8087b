"""Image files → pixels, in worker processes, by the decoder that serves. Knows no classes and no split."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from service.errors import FoldserveError
from service.preprocessing import Preprocessing, decode
from training.errors import DataError

CHUNK = 64  # files that a worker decodes before it hands them over


class ImageFiles:
    """Files that look like an array uint8 (N, height, width, channels); they are decoded when they are asked for."""

    def __init__(self, paths: Sequence[Path], spec: Preprocessing) -> None:
        self.paths = np.array([str(path) for path in paths], dtype=object)
        self.spec = spec

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, ...]:
        """N, height, width, channels."""
        return len(self.paths), *self.spec.size, self.spec.channels

    def at(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels of one image. Raises DataError naming the file."""
        try:
            return decode(Path(self.paths[index]).read_bytes(), self.spec)
        except FoldserveError as error:
            raise DataError(f"{self.paths[index]} cannot be decoded: {error}") from None
        except OSError as error:
            raise DataError(f"{self.paths[index]} cannot be read: {error.strerror}") from None

    def __getitem__(self, indices: Any) -> NDArray[np.uint8]:
        """Return the pixels at a slice or at indices, decoded here and now."""
        numbers = np.arange(len(self))[indices]
        empty = np.zeros((0, *self.shape[1:]), np.uint8)
        return np.stack([self.at(int(number)) for number in numbers]) if len(numbers) else empty

    def content(self) -> list[bytes]:
        """Return each file's class, name and size: what tells whether the files are still the same, undecoded."""
        files = [Path(path) for path in self.paths]
        return [repr((file.parent.name, file.name, file.stat().st_size)).encode() for file in files]

    def take(self, indices: NDArray[np.int64]) -> Self:
        """Return some of the files."""
        return type(self)([Path(path) for path in self.paths[indices]], self.spec)


@dataclass(frozen=True, slots=True)
class Scan:
    """What reading every file once found: pixels where they were to be kept, and what cannot be decoded, by index."""

    pixels: NDArray[np.uint8] | None
    bad: dict[int, str]


def scan(files: ImageFiles, *, workers: int, keep: bool) -> Scan:
    """Decode every file once, in `workers` processes, and note which fail."""
    pixels = np.zeros(files.shape, np.uint8) if keep else None
    bad: dict[int, str] = {}
    chunks = (range(start, min(start + CHUNK, len(files))) for start in range(0, len(files), CHUNK))
    loader = _loader(_Tolerant(files), chunks, workers)
    for chunk in loader:
        for index, found in chunk:
            if isinstance(found, str):
                bad[index] = found
            elif pixels is not None:
                pixels[index] = found
    return Scan(pixels, bad)


def stream(files: ImageFiles, batches: Iterable[NDArray[np.int64]], *, workers: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels of each batch of indices, in order, decoded ahead in `workers` processes. Raises DataError."""
    for batch in _loader(_Strict(files), (list(map(int, batch)) for batch in batches), workers):
        if isinstance(batch, str):
            raise DataError(batch)
        yield batch


def worker_count(requested: int) -> int:
    """Return the number of decoding processes: as asked for, or one for each core that this process may use."""
    return requested if requested >= 0 else len(os.sched_getaffinity(0))


class _Tolerant(Dataset[Any]):
    """Chunks of files as (index, pixels or what was wrong)."""

    def __init__(self, files: ImageFiles) -> None:
        self._files = files

    def __getitem__(self, chunk: Any) -> list[tuple[int, NDArray[np.uint8] | str]]:
        return [(index, self._one(index)) for index in chunk]

    def _one(self, index: int) -> NDArray[np.uint8] | str:
        try:
            return self._files.at(index)
        except DataError as error:
            return str(error)


class _Strict(Dataset[Any]):
    """Batches of pixels, or what was wrong: an error as text, for torch would wrap an exception in its own words."""

    def __init__(self, files: ImageFiles) -> None:
        self._files = files

    def __getitem__(self, batch: Any) -> NDArray[np.uint8] | str:
        try:
            return self._files[batch]
        except DataError as error:
            return str(error)


def _loader(dataset: Dataset[Any], chunks: Iterable[Any], workers: int) -> Iterable[Any]:
    # The generator is only there because a loader without one draws from torch's own, which a run counts on.
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=chunks,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        generator=torch.Generator(),
        collate_fn=_as_it_is,
    )


def _as_it_is(value: Any) -> Any:
    return value
