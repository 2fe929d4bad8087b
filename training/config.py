"""The frozen configuration of a run, and where it comes from.

A preset, then a file (`--config`, JSON or TOML), then `--set KEY=VALUE`: the later wins. Unknown keys are errors.
"""

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

from service.errors import nearest
from training.errors import UsageError

CHOICES = {
    "device": ("auto", "cuda", "cpu"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("off", "on", "auto"),
    "mode": ("auto", "L", "RGB"),
    "resize": ("exact", "shorter_side"),
    "domains": ("union", "batches", "separate"),
    "norm": ("batch", "layer", "group", "none"),
    "optimizer": ("sgd", "adamw", "adagrad"),
    "schedule": ("linear", "cosine", "one_cycle", "exponential", "constant"),
}

RANGES = {  # at least the first, less than the second
    "epochs": (1, math.inf),
    "batch_size": (2, math.inf),  # BatchNorm of one image has no variance
    "learning_rate": (1e-9, math.inf),
    "warmup_share": (0, 1),
    "momentum": (0, 1),
    "weight_decay": (0, math.inf),
    "beta2": (0, 1),
    "accumulator": (0, math.inf),
    "decay_rate": (1e-9, 1 + 1e-9),
    "decay_steps": (1, math.inf),
    "l1": (0, math.inf),
    "l2": (0, math.inf),
    "dropout": (0, 1),
    "label_smoothing": (0, 1),
    "bn_momentum": (1e-9, 1 + 1e-9),
    "bn_eps": (0, 1),
    "translate": (0, math.inf),
    "rotate": (0, 360),
    "scale": (0, 1),
    "cutout": (0, math.inf),
    "validation_images": (1, math.inf),
    "test_share": (0.01, 0.9),
    "limit_images": (0, math.inf),
    "size": (0, 2**14),
    "workers": (-1, 1024),
    "resident_mib": (0, math.inf),
    "population_images": (0, math.inf),
    "freeze_statistics_from": (0, math.inf),
    "weight_ema": (0, 1),
    "accumulate": (1, math.inf),
    "clip_norm": (0, math.inf),
    "patience": (0, math.inf),
    "save_steps": (0, math.inf),
    "threads": (0, 1025),
    "seed": (0, 2**31),
}

# TensorFlow's names for the same thing, accepted beside PyTorch's: what is given is taken from 1.
COMPLEMENTS = {"bn_decay": "bn_momentum"}
SHORT = {"lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size", "model": "architecture", "data": "dataset"}
WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run. `momentum` is SGD's; `bn_momentum` is PyTorch's, the weight of the new batch: 1 − TensorFlow's decay.

    `bn_decay` is accepted where keys are given by name, and stored as `bn_momentum`.
    """

    dataset: str
    architecture: str
    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.1  # the peak
    warmup_share: float = 0.2  # of all steps, in which the learning rate climbs to the peak
    schedule: str = "linear"  # or cosine, one_cycle, exponential, constant
    decay_rate: float = 0.95  # of the exponential schedule, every decay_steps
    decay_steps: int = 1000
    optimizer: str = "sgd"  # or adamw, adagrad
    momentum: float = 0.9  # Nesterov's in sgd, beta 1 in adamw
    beta2: float = 0.999  # of adamw
    accumulator: float = 0.0  # where adagrad's starts; 0.1 in TensorFlow
    weight_decay: float = 5e-4  # on weights of convolutions and linear layers alone
    decoupled: bool = False  # decay beside the gradient, not as part of it; adamw always does
    l1: float = 0.0  # penalty in the loss, times the sum of |w|
    l2: float = 0.0  # penalty in the loss, times half the sum of w²
    dropout: float = 0.0  # share dropped before the last layer: 1 - TensorFlow's keep
    label_smoothing: float = 0.0
    norm: str = "batch"  # or layer, group, none
    bn_momentum: float = 0.1
    bn_eps: float = 1e-5
    standardise: bool = True  # pixels by mean and deviation of the training images; otherwise scaled to 0–1 alone
    translate: float = 0.0  # largest random shift of a training image, pixels
    rotate: float = 0.0  # largest random turn, degrees
    scale: float = 0.0  # largest random stretch, share of the size
    flip: bool = False  # mirror half of the training images, left and right
    alternate_flip: bool = False  # with flip: which half is drawn once, and each epoch shows the other sides
    cutout: float = 0.0  # side of a square that is blackened in each training image, pixels
    validation_images: int = 5000  # held out of the training images; `best` is chosen on them
    test_share: float = 0.15  # of an image folder that has no test part of its own
    limit_images: int = 0  # at most so many training images of each domain, stratified; 0: all
    size: int = 0  # height and width, pixels; 0: the data set's own, 64 for image folders
    mode: str = "auto"  # auto: the data set's own, RGB for image folders
    resize: str = "exact"  # shorter_side: to 8/7 of `size`, then the centre crop
    workers: int = -1  # processes that decode image folders; -1: one a core
    resident_mib: int = 2048  # an image folder that is larger once decoded streams from the disk
    skip_bad: bool = False  # go on without the files that cannot be decoded
    domains: str = "union"  # of dataset = a+b: mixed batches, a batch from one domain, or BatchNorm for each domain
    bn_bias_correction: bool = True  # running mean and variance without what is left of 0 and 1
    population_images: int = 10_000  # for population statistics at the end; 0: keep the running ones
    freeze_statistics_from: int = 0  # the epoch from which BatchNorm uses its running statistics as they are; 0: never
    freeze_gamma: bool = False  # γ stays 1, β trains
    freeze_affine: bool = False  # γ and β stay as they were initialised
    sync_bn: bool = True  # under torchrun: BatchNorm sees the batch of all processes
    weight_ema: float = 0.0  # decay of the moving average of weights, by step; it is what is validated and kept
    accumulate: int = 1  # parts of a batch that run one after another; BatchNorm sees a part
    clip_norm: float = 0.0  # largest norm of the gradient; 0: any
    patience: int = 0  # epochs without a better validation after which a run ends; 0: never
    save_steps: int = 0  # write `last` every so many steps too; 0: at the end of epochs
    deterministic: bool = False  # refuse operations whose result may differ from run to run
    threads: int = 0  # of the CPU; 0: torch's choice, which is recorded
    seed: int = 0
    device: str = "auto"
    compile: str = "off"  # on: steps run through torch.compile; auto: on CUDA, where that works
    precision: str = "auto"  # bfloat16 autocast on CUDA and on CPUs that multiply it, float32 elsewhere

    def __post_init__(self) -> None:
        """Raise UsageError for values that cannot be meant."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise UsageError(f"{name} = {given}{nearest(given, allowed)}: expected one of {', '.join(allowed)}")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) < high:
                below = "" if high == math.inf else f" and less than {high:g}"
                raise UsageError(f"{name} = {getattr(self, name)}: expected at least {low:g}{below}")

        if self.freeze_statistics_from == 1:
            raise UsageError("freeze_statistics_from = 1: nothing was measured yet; expected 0, or at least 2")
        if self.batch_size % self.accumulate or self.batch_size // self.accumulate < 2:
            raise UsageError(
                f"accumulate = {self.accumulate}: expected a divisor of batch_size = {self.batch_size} that leaves "
                "BatchNorm at least 2 images"
            )
        if self.alternate_flip and not self.flip:
            raise UsageError(
                "alternate_flip = true says how flip = true mirrors; set that too, or alternate_flip = false"
            )

    def to_json(self) -> str:
        """Return what `from_mapping` of the parsed text turns back into this configuration."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def unchanged_images(self) -> Self:
        """Return a copy that shows images and labels as they are."""
        still = replace(self, translate=0.0, rotate=0.0, scale=0.0, flip=False, alternate_flip=False)
        return replace(still, cutout=0.0, label_smoothing=0.0)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from all keys. Raises UsageError for a key that is missing, unknown or of another type."""
        named = {name: _convert(name, value) for name, value in _by_own_names(values).items()}
        if missing := sorted({"dataset", "architecture", "epochs"} - set(named)):
            raise UsageError(f"missing {', '.join(missing)}")
        return cls(**named)

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with some keys changed. Raises UsageError for an unknown key or a value of another type."""
        named = _by_own_names(values)
        return replace(self, **{name: _convert(name, value) for name, value in named.items()})


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the keys of a JSON or TOML file. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        kind = (
            "TOML" if path.suffix.lower() == ".toml" else "JSON, which every file is read as that is not named *.toml"
        )
        raise UsageError(f"{path}: {error}; expected {kind}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected keys and values")
    return values


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """Turn `KEY=VALUE` texts into a mapping. Raises UsageError."""
    pairs = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment}: expected KEY=VALUE")
        pairs[key.strip()] = value.strip()
    return pairs


def _by_own_names(values: Mapping[str, Any]) -> dict[str, Any]:
    named = dict(values)
    for theirs, ours in COMPLEMENTS.items():
        if theirs in named:
            if ours in named:
                raise UsageError(f"{theirs} and {ours} are one key: {theirs} = 1 - {ours}; give one of them")
            given = _convert(ours, named.pop(theirs), told_as=theirs)
            named[ours] = float(1 - Decimal(str(given)))  # in decimals, so that 0.999 leaves 0.001
    return named


def _meant(name: str, names: Iterable[str]) -> str:
    return f" (did you mean {SHORT[name]}?)" if name in SHORT else nearest(name, names)


def _convert(name: str, value: Any, told_as: str | None = None) -> Any:
    types = {field.name: field.type for field in fields(TrainConfig)}
    if name not in types:
        names = [*types, *COMPLEMENTS]
        raise UsageError(f"{name} is not a configuration key{_meant(name, names)}; there are {', '.join(names)}")
    wanted, name = types[name], told_as or name
    if wanted is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if isinstance(value, str) and wanted in (int, float):
        value = _parse_number(name, value, wanted)
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise UsageError(f"{name} = {value}: expected {WORDS[wanted]}")
    return value


def _parse_number(name: str, text: str, wanted: Any) -> Any:
    try:
        return wanted(text)
    except ValueError:
        raise UsageError(f"{name} = {text}: expected {WORDS[wanted]}") from None
