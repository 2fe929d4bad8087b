"""The images that an import is checked with: real ones from a folder, else made up, which the result then says."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import ServiceError
from service.preprocessing import Preprocessing, decode
from service.wording import counted
from training.data.folders import SUFFIXES
from training.errors import DataError
from training.exact.convert import Labelled, Material
from training.parity import FEWEST_IMAGES

CHECKED = 64
CALIBRATION = 256  # 10³ and fewer do (Wu & Johnson 2021, arXiv 2105.07576, section 3)
COARSE = 8  # made-up images have about this many patches a side, as photos have areas


def folder_images(folder: Path, spec: Preprocessing, most: int = CHECKED) -> tuple[NDArray[np.uint8], list[str]]:
    """Return up to `most` images spread over a folder and its subfolders, and for each the subfolder's name.

    Images uint8 (N, height, width, channels), decoded as the service will. Raises DataError where fewer than 8 can be.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    chosen = np.unique(np.linspace(0, max(0, len(paths) - 1), most).astype(int))
    images, classes = [], []
    for index in chosen[: len(paths)]:
        try:
            images.append(decode(paths[index].read_bytes(), spec))
            classes.append(paths[index].parent.name)
        except (ServiceError, OSError):
            continue  # a broken picture in a folder of thousands is usual
    if len(images) < FEWEST_IMAGES:
        raise DataError(
            f"--data {folder}: {counted(len(images), 'image')} could be read, at least {FEWEST_IMAGES} are needed"
        )
    return np.stack(images), classes


def folder_material(folder: Path, spec: Preprocessing, labels: tuple[str, ...]) -> Material:
    """Return a folder's images to make an exact form with: every second one where the subfolders bear their labels.

    The others judge it then, for what it was made with would flatter it. Raises DataError where fewer than 8 can be
    read.
    """
    images, classes = folder_images(folder, spec, 2 * CALIBRATION)
    if not set(classes) <= set(labels) or len(images) < 2 * FEWEST_IMAGES:
        return Material(images[:: max(1, len(images) // CALIBRATION)])  # no need of twice as many
    targets = np.array([labels.index(name) for name in classes], np.int64)
    return Material(images[::2], Labelled(images[1::2], targets[1::2]))


def synthetic_images(spec: Preprocessing, count: int = CHECKED) -> NDArray[np.uint8]:
    """Return seeded images of smooth patches with noise, uint8 (N, height, width, channels)."""
    random = np.random.default_rng(0)
    height, width = spec.size
    coarse = random.uniform(0, 255, (count, COARSE, COARSE, spec.channels))
    rows, columns = (np.linspace(0, COARSE - 1, extent).round().astype(int) for extent in (height, width))
    patches = coarse[:, rows][:, :, columns]
    noisy = patches + random.normal(scale=12, size=patches.shape)
    return noisy.clip(0, 255).round().astype(np.uint8)
