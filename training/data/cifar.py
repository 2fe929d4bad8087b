"""CIFAR-10 in its binary version: records of a label byte and 32 × 32 pixels in three planes. Nothing is unpickled.

Either the published archive, whose MD5 is the published one, or the files that it holds, whose sizes and labels are
checked: for the files alone no checksum was ever published.
"""

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.parts import Split, checked_targets
from training.errors import DataError

RECORD = 1 + 3 * 32 * 32  # bytes: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version"
TRAINING_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("test_batch.bin",)
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LICENCE = "none stated (Krizhevsky 2009)"
FOLDERS = ("cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", ".")


@dataclass(frozen=True, slots=True)
class CifarSource:
    """The published files."""

    archive: str = "cifar-10-binary.tar.gz"
    md5: str = "c32a1d4ab5d03f1284b67883e8d87530"
    images_per_file: int = 10_000


def read_cifar(folders: list[Path], source: CifarSource | None = None) -> tuple[Split, Split]:
    """Return training and test part from the first of `folders` that holds them. Raises DataError."""
    source = source or CifarSource()
    for folder in (base / below for base in folders for below in FOLDERS):
        if (folder / source.archive).is_file():
            contents = _unpack(folder / source.archive, source)
        elif all((folder / name).is_file() for name in (*TRAINING_FILES, *TEST_FILES)):
            contents = {name: (folder / name).read_bytes() for name in (*TRAINING_FILES, *TEST_FILES)}
        else:
            continue
        return tuple(_joined(folder, names, contents, source) for names in (TRAINING_FILES, TEST_FILES))  # type: ignore[return-value] # two names, two parts
    looked = ", ".join(str(folder / "cifar10") for folder in folders)
    raise DataError(
        f"cifar10 is not in {looked}; put {source.archive} (the binary version, not the pickled one) or its *.bin "
        "files there, or name their folder with --data-dir"
    )


def _unpack(path: Path, source: CifarSource) -> dict[str, bytes]:
    try:
        if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != source.md5:
            raise DataError(f"{path} is damaged: its MD5 is not the published {source.md5}; get it again")
        with tarfile.open(path) as archive:
            members = ((Path(one.name).name, archive.extractfile(one)) for one in archive if one.isfile())
            return {name: file.read() for name, file in members if file is not None}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _joined(folder: Path, names: tuple[str, ...], contents: dict[str, bytes], source: CifarSource) -> Split:
    images, targets = [], []
    for name in names:
        records = _records(folder / name, contents.get(name, b""), source)
        targets.append(checked_targets(records[:, 0], len(LABELS), folder / name))
        images.append(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))  # planes → (N, 32, 32, 3)
    return Split(np.ascontiguousarray(np.concatenate(images)), np.concatenate(targets))


def _records(path: Path, content: bytes, source: CifarSource) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    wanted = source.images_per_file * RECORD
    if len(content) != wanted:
        raise DataError(
            f"{path} is damaged: {len(content):,} bytes, expected {wanted:,} ({source.images_per_file:,} images of "
            f"{RECORD:,} bytes); get it again"
        )
    return np.frombuffer(content, np.uint8).reshape(-1, RECORD)
