"""The frozen configuration of a run, where it comes from, and the only reader of the environment in `training`.

A preset, then a file (`--config`, JSON or TOML), then `--set KEY=VALUE`: the later wins. Unknown keys are errors.
"""

import json
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from service.errors import nearest
from training.errors import UsageError

CHOICES = {
    "device": ("auto", "cuda", "cpu"),
    "precision": ("auto", "float32", "bfloat16"),
}

RANGES = {  # at least the first, less than the second
    "epochs": (1, math.inf),
    "batch_size": (2, math.inf),  # BatchNorm of one image has no variance
    "learning_rate": (1e-9, math.inf),
    "warmup_share": (0, 1),
    "momentum": (0, 1),
    "weight_decay": (0, math.inf),
    "label_smoothing": (0, 1),
    "bn_momentum": (1e-9, 1 + 1e-9),
    "translate": (0, math.inf),
    "rotate": (0, 360),
    "scale": (0, 1),
    "validation_images": (1, math.inf),
    "seed": (0, 2**31),
}


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run. `momentum` is SGD's; `bn_momentum` is PyTorch's, the weight of the new batch: 1 − TensorFlow's decay."""

    dataset: str
    architecture: str
    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.1  # the peak
    warmup_share: float = 0.2  # of all steps, in which the learning rate climbs to the peak
    momentum: float = 0.9
    weight_decay: float = 5e-4  # on weights of convolutions and linear layers alone
    label_smoothing: float = 0.0
    bn_momentum: float = 0.1
    translate: float = 0.0  # largest random shift of a training image, pixels
    rotate: float = 0.0  # largest random turn, degrees
    scale: float = 0.0  # largest random stretch, share of the size
    validation_images: int = 5000  # held out of the training images; `best` is chosen on them
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"  # bfloat16 autocast on CUDA and on CPUs that multiply it, float32 elsewhere

    def __post_init__(self) -> None:
        """Raise UsageError for values that cannot be meant."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} = {getattr(self, name)}: expected one of {', '.join(allowed)}")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) < high:
                below = "" if high == math.inf else f" and less than {high:g}"
                raise UsageError(f"{name} = {getattr(self, name)}: expected at least {low:g}{below}")

    def to_json(self) -> str:
        """Return what `from_mapping` of the parsed text turns back into this configuration."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from all keys. Raises UsageError for a key that is missing, unknown or of another type."""
        required = {"dataset", "architecture", "epochs"}
        if missing := sorted(required - set(values)):
            raise UsageError(f"missing {', '.join(missing)}")
        base = cls(**{name: _convert(name, values[name]) for name in required})
        return base.with_values(values)

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with some keys changed. Raises UsageError for an unknown key or a value of another type."""
        return replace(self, **{name: _convert(name, value) for name, value in values.items()})


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the keys of a JSON or TOML file. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
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


def data_folders(flag: Path | None) -> list[Path]:
    """Return where data sets are looked for: `--data-dir`, else FOLDSERVE_DATA, then the download folder."""
    given = [flag] if flag is not None else [Path(value) for value in [os.environ.get("FOLDSERVE_DATA")] if value]
    return [*given, download_folder()]


def calm_idle_threads() -> None:
    """Let OpenMP's idle threads sleep; call before torch is imported.

    By default they spin, and when another process holds a core a training step waits for a thread that cannot run:
    on two busy cores a run took twice the CPU time.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def download_folder() -> Path:
    """Return where downloads are kept: `data` in the state folder."""
    return Path(os.environ.get("FOLDSERVE_STATE") or Path.home() / ".cache" / "foldserve") / "data"


def _convert(name: str, value: Any) -> Any:
    types = {field.name: field.type for field in fields(TrainConfig)}
    if name not in types:
        raise UsageError(f"{name} is not a configuration key{nearest(name, types)}; there are {', '.join(types)}")
    wanted = types[name]
    if isinstance(value, str) and wanted in (int, float):
        value = _parse_number(name, value, wanted)
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise UsageError(f"{name} = {value}: expected {getattr(wanted, '__name__', wanted)}")
    return value


def _parse_number(name: str, text: str, wanted: Any) -> Any:
    try:
        return wanted(text)
    except ValueError:
        raise UsageError(f"{name} = {text}: expected {wanted.__name__}") from None
