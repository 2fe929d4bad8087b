"""Image folders: `train/<class>/…` with `val/` and `test/` where there are any, or one tree `<class>/…`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.preprocessing import Preprocessing
from service.wording import counted
from training.config import TrainConfig
from training.data.decoding import ImageFiles, scan, worker_count
from training.data.parts import Dataset, Split, check_classes, hold_out, limited, neutral
from training.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
TRAINING_NAMES, VALIDATION_NAMES, TEST_NAMES = ("train", "training"), ("val", "valid", "validation"), ("test",)
DEFAULT_SIZE = 64
NAMED_BAD_FILES = 10
FEWEST = 2  # training images of a class: some are held out for validation, where no folder brings them
FEWEST_OF_ONE_TREE = 3  # some for the test, too


@dataclass(frozen=True, slots=True)
class _Tree:
    """The files of one part: paths with the number of each one's class."""

    folder: Path
    paths: list[Path]
    targets: list[int]


def read_folder(
    name: str, folder: Path, config: TrainConfig, spec: Preprocessing | None = None, say: Callable[[str], None] = print
) -> Dataset:
    """Read an image folder as a data set. Raises DataError naming the folder, class or files that are wrong."""
    spec = spec or folder_preprocessing(config)
    named = _named_parts(folder)
    training = named.get("training", folder)
    labels = tuple(sorted(path.name for path in training.iterdir() if path.is_dir() and path.name[0] != "."))
    if not labels:
        raise DataError(f"{training} holds no class folders; expected {training}/<class>/<image files>")
    if len(labels) == 1:
        raise DataError(f"{training} holds one class, {labels[0]}; a classifier needs a folder for each of two or more")
    trees = {part: _walk(path, labels) for part, path in {**named, "training": training}.items()}
    fewest = FEWEST if named.keys() > {"training"} else FEWEST_OF_ONE_TREE
    _refuse_small_classes(training, trees["training"].targets, labels, fewest)
    splits, skipped = _read(trees, config, spec, say)
    _refuse_small_classes(training, splits["training"].targets, labels, fewest, " that can be decoded")
    parts, how = _divided(splits, config)
    check_classes(parts[0], labels, str(training))
    return Dataset(name, labels, f"see {folder}", how, *parts, preprocessing=spec, skipped=skipped)


def folder_preprocessing(config: TrainConfig) -> Preprocessing:
    """Return what is done to the images of a folder: in RGB, 64 pixels, stretched, unless the configuration says."""
    size = config.size or DEFAULT_SIZE
    mode = "RGB" if config.mode == "auto" else config.mode
    resize_to = size * 8 // 7 if config.resize == "shorter_side" else None  # 256 for 224, as is usual
    return neutral(mode, (size, size), resize=config.resize, resize_to=resize_to)


def _named_parts(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    names = {"training": TRAINING_NAMES, "validation": VALIDATION_NAMES, "test": TEST_NAMES}
    found = {part: folder / name for part, known in names.items() for name in known if (folder / name).is_dir()}
    return found if "training" in found else {}


def _walk(folder: Path, labels: tuple[str, ...]) -> _Tree:
    unknown = [path.name for path in folder.iterdir() if path.is_dir() and path.name not in labels]
    if unknown := [name for name in unknown if name[0] != "."]:
        raise DataError(f"{folder / unknown[0]}: there is no class {unknown[0]} among the training images")
    paths: list[Path] = []
    targets: list[int] = []
    for target, label in enumerate(labels):
        files = sorted(path for path in (folder / label).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not files and folder.name not in (*VALIDATION_NAMES, *TEST_NAMES):
            kinds = ", ".join(sorted(SUFFIXES))
            raise DataError(f"{folder / label} holds no image ({kinds}); add images, or remove the folder")
        paths += files
        targets += [target] * len(files)
    return _Tree(folder, paths, targets)


def _refuse_small_classes(
    folder: Path, targets: Sequence[int] | NDArray[np.int64], labels: tuple[str, ...], fewest: int, kind: str = ""
) -> None:
    counts = np.bincount(targets, minlength=len(labels))
    if counts.min() < fewest:
        label, count = labels[int(counts.argmin())], int(counts.min())
        needed = "for training, validation and test" if fewest == FEWEST_OF_ONE_TREE else "to learn from"
        raise DataError(
            f"{folder / label} holds {counted(count, 'image')}{kind}; a class needs at least {fewest}, {needed}: add "
            "images, or remove the folder"
        )


def _read(
    trees: dict[str, _Tree], config: TrainConfig, spec: Preprocessing, say: Callable[[str], None]
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Decode every file once; keep the pixels where they fit. Raises DataError listing what cannot be decoded."""
    count = sum(len(tree.paths) for tree in trees.values())
    is_small = count * spec.size[0] * spec.size[1] * spec.channels <= config.resident_mib * 2**20
    splits, bad = {}, []
    for part, tree in trees.items():
        files = ImageFiles(tree.paths, spec)
        found = scan(files, workers=worker_count(config.workers), keep=is_small)
        bad += list(found.bad.values())
        good = np.array([index for index in range(len(files)) if index not in found.bad], dtype=np.int64)
        images = files.take(good) if found.pixels is None else found.pixels[good]
        splits[part] = Split(images, np.array(tree.targets, dtype=np.int64)[good])
    if bad:
        listed = "; ".join(bad[:NAMED_BAD_FILES]) + ("; …" if len(bad) > NAMED_BAD_FILES else "")
        if not config.skip_bad:
            raise DataError(
                f"{len(bad):,} of {counted(count, 'image')} cannot be decoded: {listed}. Mend them, or give --skip-bad"
            )
        say(f"skipped {len(bad):,} of {counted(count, 'image')}: {listed}")
    return splits, tuple(bad)


def _divided(splits: dict[str, Split], config: TrainConfig) -> tuple[tuple[Split, Split, Split], str]:
    """Return training, validation and test part, and how they came about in words."""
    training, seed = splits["training"], config.seed
    total, words = len(training), []
    if "test" in splits:
        test = splits["test"]
        words.append(f"{counted(len(test), 'image')} of its own test folder")
    elif "validation" in splits:  # a usual layout has train and val alone: what chose nothing must be left for the test
        test = splits.pop("validation")
        words.append(f"the {counted(len(test), 'image')} of its validation folder as test images")
    else:
        training, test = hold_out(training, max(1, round(config.test_share * total)), seed=0)
        words.append(f"{counted(len(test), 'test image')}, stratified, seed 0")
    if "validation" in splits:
        validation = splits["validation"]
        words.append(f"{len(validation)} of its own validation folder")
    else:
        count = min(config.validation_images, max(1, round(config.test_share * total)))
        training, validation = hold_out(training, count, seed)
        words.append(f"{count} for validation, stratified, seed {seed}")
    training = limited(training, config.limit_images, seed)
    return (training, validation, test), f"{', '.join(words)}, {len(training)} for training"
