"""Which reader a data set's name means, and several data sets as the domains of one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import nearest
from service.preprocessing import Preprocessing, from_pixels
from training.config import TrainConfig
from training.data import cifar, svhn
from training.data.folders import folder_preprocessing, read_folder
from training.data.idx import IDX_SOURCES, find_idx, read_pair
from training.data.parts import TEN_DIGITS, Dataset, Split, concatenated, hold_out, limited, neutral
from training.environment import data_folders
from training.errors import DataError, UsageError

FOLDER = "folder:"
JOIN = "+"
SINGLE_READERS = ("digits", "cifar10", "svhn")


def dataset_names() -> list[str]:
    """Return the data sets that `load` knows by name; `folder:PATH` is any image folder."""
    return [*SINGLE_READERS, *IDX_SOURCES]


def load(
    config: TrainConfig,
    data_dir: Path | None = None,
    *,
    download: bool = False,
    say: Callable[[str], None] = print,
) -> Dataset:
    """Load the data set of a run. Raises UsageError for an unknown name, DataError for one missing or damaged.

    `folder:PATH` is an image folder, looked for here and then where data sets lie; `a+b` joins data sets of the same
    classes as domains.
    """
    source = _Source(config=config, data_dir=data_dir, download=download, say=say)
    names = config.dataset.split(JOIN)
    for name in names:
        _check_name(name)
    if len(names) == 1:
        if config.domains != "union":
            raise UsageError(f"domains = {config.domains}: dataset = {config.dataset} is one domain; join two as a+b")
        return _fitted(source.load(names[0]), config)
    return _joined(names, source)


def _check_name(name: str) -> None:
    known = dataset_names()
    if name not in known and not name.startswith(FOLDER):
        raise UsageError(
            f"dataset {name} is not known{nearest(name, known)}; {', '.join(known)}, or {FOLDER}PATH for image files"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where data sets come from, and what a run wants of them."""

    config: TrainConfig
    data_dir: Path | None
    download: bool
    say: Callable[[str], None]

    def load(self, name: str, spec: Preprocessing | None = None) -> Dataset:
        """Load one data set; a folder's images become what `spec` says."""
        config, folders = self.config, data_folders(self.data_dir)
        if name.startswith(FOLDER):
            path = _find_folder(name.removeprefix(FOLDER), folders)
            return read_folder(name, path, config, spec, self.say)
        if name == "digits":
            return _load_digits(config)
        if name == "cifar10":
            return _held_out(name, cifar.LABELS, cifar.LICENCE, cifar.read_cifar(folders), config)
        if name == "svhn":
            return _held_out(name, TEN_DIGITS, svhn.LICENCE, svhn.read_svhn(folders), config)
        source = IDX_SOURCES[name]
        folder = find_idx(name, source, folders, download=self.download)
        parts = read_pair(folder, source, "train"), read_pair(folder, source, "t10k")
        return _held_out(name, source.labels, source.licence, parts, config)


def _find_folder(path: str, folders: list[Path]) -> Path:
    candidates = [Path(path), *(folder / path for folder in folders)]
    found = next((one for one in candidates if one.is_dir()), None)
    if found is None:
        raise DataError(f"{path} is no folder here, nor in {', '.join(map(str, folders))}; name one that is there")
    return found


def _held_out(
    name: str, labels: tuple[str, ...], licence: str, parts: tuple[Split, Split], config: TrainConfig
) -> Dataset:
    train, test = parts
    training, validation = hold_out(train, config.validation_images, config.seed)
    training = limited(training, config.limit_images, config.seed)
    split = f"{config.validation_images} of its training images held out for validation, stratified, seed {config.seed}"
    if config.limit_images:
        split += f"; {len(training)} of the others to train on"
    return Dataset(name, labels, licence, split, training, validation, test, preprocessing=_own(train))


def _load_digits(config: TrainConfig) -> Dataset:
    from sklearn.datasets import load_digits  # noqa: PLC0415 - 1 s to import, and only this set needs it

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]  # ink counts 0–16 → (N, 8, 8, 1)
    rest, test = hold_out(Split(images, bunch.target.astype(np.int64)), 360, seed=0)
    training, validation = hold_out(rest, config.validation_images, config.seed)
    training = limited(training, config.limit_images, config.seed)
    split = (
        f"360 test images stratified by seed 0, {config.validation_images} for validation by seed {config.seed}, of "
        "the 1,797 of scikit-learn's copy (the UCI test set); writers are not kept apart"
    )
    licence = "CC BY 4.0 (UCI, Alpaydin and Kaynak)"
    return Dataset("digits", TEN_DIGITS, licence, split, training, validation, test, preprocessing=_own(training))


def _own(split: Split) -> Preprocessing:
    _, height, width, channels = split.images.shape
    return neutral("L" if channels == 1 else "RGB", (height, width))


def _fitted(dataset: Dataset, config: TrainConfig) -> Dataset:
    """Bring pixels in memory to the size and mode that the configuration asks for, as the service would."""
    own = dataset.preprocessing
    size = (config.size, config.size) if config.size else own.size
    spec = neutral(own.mode if config.mode == "auto" else config.mode, size)
    is_folder = dataset.name.startswith(FOLDER)
    return dataset if is_folder else _converted(dataset, spec)


def _converted(dataset: Dataset, spec: Preprocessing) -> Dataset:
    if spec == dataset.preprocessing:
        return dataset
    parts = {name: getattr(dataset, name) for name in ("training", "validation", "test")}
    changed: dict[str, Any] = {
        name: replace(split, images=_convert(split.images, spec)) for name, split in parts.items()
    }
    return replace(dataset, preprocessing=spec, **changed)


def _convert(images: NDArray[np.uint8], spec: Preprocessing) -> NDArray[np.uint8]:
    return np.stack([from_pixels(image, spec) for image in images])


def _joined(names: list[str], source: _Source) -> Dataset:
    """Load several data sets in one size and mode, as domains."""
    config = source.config
    arrays = [name for name in names if not name.startswith(FOLDER)]
    known = {name: source.load(name) for name in arrays}
    specs = [one.preprocessing for one in known.values()] or [folder_preprocessing(config)]
    side = config.size or max(max(spec.size) for spec in specs)
    is_gray = all(spec.mode == "L" for spec in specs) and len(known) == len(names)
    mode = ("L" if is_gray else "RGB") if config.mode == "auto" else config.mode
    spec = neutral(mode, (side, side))
    sets = [_converted(known[name], spec) if name in known else source.load(name, spec) for name in names]
    return _as_domains(sets, [_domain_name(name) for name in names], config.dataset, spec)


def _as_domains(sets: list[Dataset], domains: list[str], name: str, spec: Preprocessing) -> Dataset:
    for other, domain in zip(sets[1:], domains[1:], strict=True):
        if other.labels != sets[0].labels:
            raise DataError(f"{domain} has other classes than {domains[0]}; domains share their classes, by name")
    if len(set(domains)) != len(domains):
        raise UsageError(f"dataset = {name}: a domain is there twice")
    if not all(
        isinstance(part.images, np.ndarray) for one in sets for part in (one.training, one.validation, one.test)
    ):
        raise DataError(f"{name}: domains are kept in memory; raise resident_mib, or lower size or limit_images")
    parts: dict[str, Any] = {
        part: concatenated([getattr(one, part) for one in sets]) for part in ("training", "validation", "test")
    }
    return Dataset(
        name,
        sets[0].labels,
        "; ".join(f"{domain}: {one.licence}" for domain, one in zip(domains, sets, strict=True)),
        "; ".join(f"{domain}: {one.split}" for domain, one in zip(domains, sets, strict=True)),
        preprocessing=spec,
        domains=tuple(domains),
        skipped=tuple(path for one in sets for path in one.skipped),
        **parts,
    )


def _domain_name(name: str) -> str:
    """Return a name that can be part of a model's: the last part of a folder's path, dots as dashes."""
    return Path(name.removeprefix(FOLDER)).name.replace(".", "-")
