"""MNIST and Fashion-MNIST in LeCun's IDX format: found, downloaded, checked against the published content."""

import gzip
import hashlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.wording import counted
from training.data.parts import TEN_DIGITS, Split, checked_targets
from training.environment import download_folder
from training.errors import DataError

IDX_UNSIGNED_BYTE = 0x08  # the third byte of an IDX file's magic number


@dataclass(frozen=True, slots=True)
class IdxSource:
    """A data set in LeCun's IDX format; sha256 is of the unpacked files, so that any compression of them will do."""

    url: str
    labels: tuple[str, ...]
    licence: str
    sha256: dict[str, str]


IDX_SOURCES = {
    "mnist": IdxSource(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        TEN_DIGITS,
        "CC BY-SA 3.0 (as usually stated; LeCun, Cortes, Burges)",
        {
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    "fashion-mnist": IdxSource(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        "MIT (Zalando SE)",
        {
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
}


def find_idx(name: str, source: IdxSource, folders: list[Path], *, download: bool) -> Path:
    """Return the first folder that holds the set's four files, packed or not; download them where allowed."""
    for folder in [folder / name for folder in folders] + [folder for folder in folders if _holds(folder, source)]:
        if all(_file_of(folder, stem) for stem in source.sha256):
            return folder
    if download:
        return _download(name, source)
    looked = ", ".join(str(folder / name) for folder in folders)
    raise DataError(f"{name} is not in {looked}; name its folder with --data-dir, or add --download")


def _holds(folder: Path, source: IdxSource) -> bool:
    """True when files that lie in a shared folder are this set's: every IDX set uses the same names."""
    stem = next(stem for stem in source.sha256 if "labels" in stem)
    path = _file_of(folder, stem)
    try:
        return path is not None and read_idx(path, source.sha256[stem]) is not None
    except DataError:
        return False


def read_idx(path: Path, sha256: str | None = None) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped or not. Raises DataError naming the file when it is damaged."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path} is damaged: its content has another sha256 than the published one; get it again")
    if len(content) < 4 or content[:3] != bytes([0, 0, IDX_UNSIGNED_BYTE]):
        raise DataError(f"{path} is not an IDX file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start]) if len(content) >= start else (0,)
    if len(content) - start != np.prod(shape):
        raise DataError(f"{path} is truncated: {counted(len(content) - start, 'byte')} for the shape {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()  # torch wants arrays it may write to


def read_pair(folder: Path, source: IdxSource, prefix: str) -> Split:
    """Read the `train` or `t10k` part that lies in `folder`. Raises DataError."""
    arrays: list[NDArray[np.uint8]] = []
    for stem in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        path = _file_of(folder, stem)
        assert path is not None
        arrays.append(read_idx(path, source.sha256[stem]))
    images, labels = arrays
    if len(images) != len(labels):
        raise DataError(
            f"{folder}: {counted(len(images), f'{prefix} image')} and {counted(len(labels), 'label')}; "
            "get the files again"
        )
    targets = checked_targets(labels, len(source.labels), folder / f"{prefix}-labels-idx1-ubyte")
    return Split(images[..., np.newaxis], targets)  # (N, 28, 28) → (N, 28, 28, 1)


def _file_of(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / f"{stem}.gz", folder / stem) if path.is_file()), None)


def _download(name: str, source: IdxSource, say: Callable[[str], None] = print) -> Path:
    import httpx  # noqa: PLC0415 - only here

    folder = download_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be made: {error.strerror}; name another folder with FOLDSERVE_STATE"
        ) from None
    for stem, sha256 in source.sha256.items():
        url, path = f"{source.url}/{stem}.gz", folder / f"{stem}.gz"
        partial = path.with_suffix(".part.gz")
        say(f"downloading {url}")
        try:
            response = httpx.get(url, timeout=60, follow_redirects=True).raise_for_status()
            partial.write_bytes(response.content)
        except (httpx.HTTPError, OSError) as error:
            raise DataError(f"{url}: {error}") from None
        read_idx(partial, sha256)
        partial.replace(path)  # whole or not at all
    return folder
