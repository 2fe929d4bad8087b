"""SVHN's cropped digits, format 2: MATLAB files with X (32, 32, 3, N) and y (N, 1), where 10 stands for the digit 0."""

import hashlib
from pathlib import Path

import numpy as np

from training.data.parts import Split
from training.errors import DataError

# Published beside the files at http://ufldl.stanford.edu/housenumbers, as torchvision records them.
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
LABELS = tuple(range(1, 11))  # 10 stands for the digit 0
LICENCE = "non-commercial use (Netzer et al. 2011)"


def read_svhn(folders: list[Path], md5: dict[str, str] | None = None) -> tuple[Split, Split]:
    """Return training and test part from the first of `folders` that holds them. Raises DataError."""
    sums = MD5 if md5 is None else md5
    for folder in (base / below for base in folders for below in ("svhn", ".")):
        if all((folder / name).is_file() for name in sums):
            training, test = (_read(folder / name, sums[name]) for name in sums)
            return training, test
    looked = ", ".join(str(folder / "svhn") for folder in folders)
    raise DataError(f"svhn is not in {looked}; put {' and '.join(sums)} there, or name their folder with --data-dir")


def _read(path: Path, md5: str) -> Split:
    from scipy.io import loadmat  # noqa: PLC0415 - only this set needs it

    if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5:
        raise DataError(f"{path} is damaged: its MD5 is not the published {md5}; get it again")
    try:
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = content["X"], content["y"].ravel()
    except Exception as error:  # noqa: BLE001 - the reader raises anything at a broken file
        raise DataError(f"{path} is not a MATLAB file with X and y: {error}") from None
    if images.ndim != 4 or images.shape[2] != 3 or images.dtype != np.uint8 or images.shape[3] != len(labels):
        raise DataError(f"{path}: X is {images.dtype} {images.shape}, expected uint8 (32, 32, 3, {len(labels)})")
    is_label = np.isin(labels, LABELS)
    if not is_label.all():
        wrong = labels[~is_label][0]
        raise DataError(
            f"{path}: label {wrong} is out of range, expected 1 to 10, where 10 is the digit 0; get it again"
        )
    targets = labels.astype(np.int64) % 10
    return Split(np.ascontiguousarray(images.transpose(3, 0, 1, 2)), targets)
