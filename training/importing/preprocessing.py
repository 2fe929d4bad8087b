"""How pixels become a foreign model's input: from flags, a torchvision preset, or timm's pretrained_cfg."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from service.errors import nearest
from service.preprocessing import Preprocessing
from training.errors import UsageError

DEFAULT_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
CROP_PCT = 0.875  # timm's default where a configuration has none (timm/data/constants.py, DEFAULT_CROP_PCT)
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")

# resize, crop and filter of torchvision's weights: torchvision/models/*.py, `partial(ImageClassification, …)`,
# 0.29. All normalise with ImageNet's mean and deviation but the one noted.
IMAGENET_V1 = (256, 224, "bilinear")
TORCHVISION: dict[str, tuple[int, int, str]] = {
    "imagenet1k_v1": IMAGENET_V1,
    "imagenet1k_v2": (232, 224, "bilinear"),
    **dict.fromkeys(
        ("alexnet", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn", "squeezenet1_0", "squeezenet1_1", "googlenet",
         "densenet121", "densenet161", "densenet169", "densenet201", "mobilenet_v3_small", "mnasnet0_5", "mnasnet1_0",
         "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "resnet18", "resnet34"),
        IMAGENET_V1,
    ),
    **dict.fromkeys(
        ("resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2",
         "wide_resnet101_2", "mobilenet_v2", "mobilenet_v3_large", "mnasnet0_75", "mnasnet1_3", "shufflenet_v2_x1_5",
         "shufflenet_v2_x2_0", "regnet_y_400mf", "regnet_y_800mf", "regnet_x_400mf", "regnet_x_800mf"),
        (232, 224, "bilinear"),
    ),
    "inception_v3": (342, 299, "bilinear"),
    "efficientnet_b0": (256, 224, "bicubic"),
    "efficientnet_b1": (255, 240, "bilinear"),
    "efficientnet_b2": (288, 288, "bicubic"),
    "efficientnet_b3": (320, 300, "bicubic"),
    "efficientnet_b4": (384, 380, "bicubic"),
    "efficientnet_v2_s": (384, 384, "bilinear"),
    "efficientnet_v2_m": (480, 480, "bilinear"),
    "efficientnet_v2_l": (480, 480, "bicubic"),
    "convnext_tiny": (236, 224, "bilinear"),
}  # fmt: skip
HALF_NORMALISED = frozenset({"efficientnet_v2_l"})  # mean and deviation 0.5


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the flags say; None is not said."""

    preprocessing: str | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def choose(wishes: Wishes, channels: int, size: tuple[int, int] | None) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return how pixels are prepared, and notes on what was assumed; `size` is the model's own, None where symbolic.

    Flags win over the file or preset. Raises UsageError where they contradict the model or themselves.
    """
    base = {} if wishes.preprocessing is None else _named(wishes.preprocessing)
    notes = []
    if wishes.mean is None and wishes.std is None and "mean" not in base:
        notes.append("no --mean and no --std: pixels are scaled to 0–1 and nothing else (mean 0, std 1)")
    if wishes.size is None and "size" not in base and size is None:
        notes.append(f"the file leaves the size open and there is no --size: {DEFAULT_SIZE} × {DEFAULT_SIZE}")
    wanted = (wishes.size, wishes.size) if wishes.size else base.get("size") or size or (DEFAULT_SIZE,) * 2
    if size is not None and wanted != size:
        raise UsageError(f"the model takes {size[0]} × {size[1]} pixels, not {wanted[0]} × {wanted[1]}")
    if wishes.size is not None and "resize_to" in base and base["resize_to"] < wishes.size:
        base["resize_to"] = wishes.size
    values = {"resize": "exact", "filter": "bilinear", **base, "mode": "L" if channels == 1 else "RGB", "size": wanted}
    values |= {"mean": _per_channel(wishes.mean or base.get("mean") or (0.0,), channels)}
    values |= {"std": _per_channel(wishes.std or base.get("std") or (1.0,), channels)}
    try:
        return Preprocessing(**values), tuple(notes)
    except ValidationError as error:
        raise UsageError(f"preprocessing: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) * channels if len(values) == 1 else tuple(values)


def _named(name: str) -> dict[str, Any]:
    if name in TORCHVISION:
        resize_to, size, filter_ = TORCHVISION[name]
        mean, std = (HALF, HALF) if name in HALF_NORMALISED else (IMAGENET_MEAN, IMAGENET_STD)
        resize: Literal["shorter_side"] = "shorter_side"
        return {
            "resize": resize, "resize_to": resize_to, "size": (size, size), "filter": filter_, "mean": mean, "std": std
        }  # fmt: skip
    path = Path(name)
    if not path.exists():
        raise UsageError(f"--preprocessing {name} is neither a file nor a preset{nearest(name, TORCHVISION)}")
    return _timm(path)


def _timm(path: Path) -> dict[str, Any]:
    """Read timm's `pretrained_cfg` (timm/models/_pretrained.py, PretrainedCfg), bare or inside a config.json."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        config = read.get("pretrained_cfg", read)
        _, height, width = config["input_size"]
        crop_pct = float(config.get("crop_pct") or CROP_PCT)
        mean, std = tuple(config["mean"]), tuple(config["std"])
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is not timm's pretrained_cfg: {error!r}") from None
    filter_ = config.get("interpolation", "bilinear")
    if filter_ not in FILTERS:
        raise UsageError(f"{path}: interpolation {filter_} is not known; there are {', '.join(FILTERS)}")
    found = {"size": (height, width), "filter": filter_, "mean": mean, "std": std}
    if config.get("crop_mode") in ("squash", "border"):
        return found  # squash: the whole image to `size`; a border is not drawn here, so the same
    return found | {
        "resize": "shorter_side",
        "resize_to": max(height, width, math.floor(min(height, width) / crop_pct)),
    }
