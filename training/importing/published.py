"""What libraries publish as preprocessing: torchvision for its weights, by name, and timm as `pretrained_cfg`, in JSON.

Where the service cannot do exactly the same to an image, a note says what differs.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import nearest
from training.errors import UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
CROP_PCT = 0.875  # timm's default where a configuration has none (timm/data/constants.py, DEFAULT_CROP_PCT)
INTERPOLATION = "bicubic"  # timm's default for the filter (timm/data/config.py, resolve_data_config)
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")

SIZES = ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")
REGNETS = " ".join(f"regnet_{kind}_{size}" for kind in "xy" for size in SIZES)
RETRAINED = (  # have older weights, imagenet1k_v1, and newer ones, imagenet1k_v2
    "resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d wide_resnet50_2 wide_resnet101_2 mobilenet_v2 "
    f"mobilenet_v3_large {REGNETS}"
)
# Shorter side, crop and filter of torchvision's classification weights, 0.29: torchvision/models/*.py,
# `partial(ImageClassification, crop_size=…, resize_size=…, interpolation=…)`.
V1 = {
    (256, 224, "bilinear"): (
        "alexnet densenet121 densenet161 densenet169 densenet201 googlenet mnasnet0_5 mnasnet1_0 mobilenet_v3_small "
        "resnet18 resnet34 shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_0 squeezenet1_1 vgg11 vgg13 vgg16 vgg19 "
        f"vgg11_bn vgg13_bn vgg16_bn vgg19_bn vit_b_16 vit_b_32 vit_l_32 {RETRAINED}"
    ),
    (232, 224, "bilinear"): (
        "resnext101_64x4d mnasnet0_75 mnasnet1_3 shufflenet_v2_x1_5 shufflenet_v2_x2_0 convnext_base convnext_large"
    ),
    (230, 224, "bilinear"): "convnext_small",
    (236, 224, "bilinear"): "convnext_tiny",
    (242, 224, "bilinear"): "vit_l_16",
    (342, 299, "bilinear"): "inception_v3",
    (256, 224, "bicubic"): "efficientnet_b0",
    (256, 240, "bicubic"): "efficientnet_b1",
    (288, 288, "bicubic"): "efficientnet_b2",
    (320, 300, "bicubic"): "efficientnet_b3",
    (384, 380, "bicubic"): "efficientnet_b4",
    (456, 456, "bicubic"): "efficientnet_b5",
    (528, 528, "bicubic"): "efficientnet_b6",
    (600, 600, "bicubic"): "efficientnet_b7",
    (384, 384, "bilinear"): "efficientnet_v2_s",
    (480, 480, "bilinear"): "efficientnet_v2_m",
    (480, 480, "bicubic"): "efficientnet_v2_l",
    (232, 224, "bicubic"): "swin_t",
    (246, 224, "bicubic"): "swin_s",
    (238, 224, "bicubic"): "swin_b",
    (260, 256, "bicubic"): "swin_v2_t swin_v2_s",
    (272, 256, "bicubic"): "swin_v2_b",
    (224, 224, "bicubic"): "maxvit_t",
}
V2 = {(232, 224, "bilinear"): RETRAINED, (255, 240, "bilinear"): "efficientnet_b1"}
SWAG_LINEAR = {(224, 224, "bicubic"): "regnet_y_16gf regnet_y_32gf regnet_y_128gf vit_b_16 vit_l_16 vit_h_14"}
SWAG_E2E = {
    (384, 384, "bicubic"): "regnet_y_16gf regnet_y_32gf regnet_y_128gf vit_b_16",
    (512, 512, "bicubic"): "vit_l_16",
    (518, 518, "bicubic"): "vit_h_14",
}
WEIGHTS = {  # in the order in which the first is a network's default
    "imagenet1k_v2": V2,
    "imagenet1k_v1": V1,
    "imagenet1k_swag_e2e_v1": SWAG_E2E,
    "imagenet1k_swag_linear_v1": SWAG_LINEAR,
}
HALF_NORMALISED = "efficientnet_v2_l"  # mean and deviation 0.5; all others have ImageNet's


@dataclass(frozen=True, slots=True)
class Published:
    """Fields of Preprocessing, and notes on what the service does otherwise."""

    values: dict[str, Any]
    notes: tuple[str, ...] = ()


def published(name: str) -> Published:
    """Return what a preset of torchvision's or a file of timm's says.

    A preset is a network, for its default weights, or network.weights; torchvision's own spelling of weights,
    `ResNet50_Weights.IMAGENET1K_V1`, is one too. Raises UsageError for a name that is neither.
    """
    presets = torchvision_presets()
    plain = name.lower().replace("_weights", "").removesuffix(".default")
    if plain in presets:
        return Published(presets[plain])
    path = Path(name)
    if not path.exists():
        raise UsageError(f"--preprocessing {name} is neither a file nor a preset{nearest(plain, presets)}")
    return _timm(path)


def torchvision_presets() -> dict[str, dict[str, Any]]:
    """Return the presets by name."""
    found: dict[str, dict[str, Any]] = {
        "imagenet1k_v1": _preset(256, 224, "bilinear", "resnet50"),
        "imagenet1k_v2": _preset(232, 224, "bilinear", "resnet50"),
    }
    for weights, groups in WEIGHTS.items():
        for (resize_to, size, filter_), networks in groups.items():
            for network in networks.split():
                preset = _preset(resize_to, size, filter_, network)
                found[f"{network}.{weights}"] = preset
                found.setdefault(network, preset)
    return found


def _preset(resize_to: int, size: int, filter_: str, network: str) -> dict[str, Any]:
    mean, std = (HALF, HALF) if network == HALF_NORMALISED else (IMAGENET_MEAN, IMAGENET_STD)
    resized = {"resize": "shorter_side", "resize_to": resize_to, "filter": filter_}
    return {**resized, "size": (size, size), "mean": mean, "std": std}


def _timm(path: Path) -> Published:
    """Read timm's `pretrained_cfg` (timm/models/_pretrained.py, PretrainedCfg), bare or inside a config.json."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        config = read.get("pretrained_cfg", read)
        height, width = map(int, config["input_size"][1:])
        crop_pct = float(config.get("crop_pct") or CROP_PCT)
        mean, std = tuple(map(float, config["mean"])), tuple(map(float, config["std"]))
    except OSError as error:
        raise UsageError(f"--preprocessing {path} cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError, KeyError):
        raise UsageError(
            f"--preprocessing {path} is not timm's pretrained_cfg: expected JSON with input_size, as [3, 224, 224], "
            "mean and std"
        ) from None
    filter_ = config.get("interpolation") or INTERPOLATION
    if filter_ not in FILTERS:
        raise UsageError(f"{path}: interpolation {filter_} is not known; there are {', '.join(FILTERS)}")
    found = {"size": (height, width), "filter": filter_, "mean": mean, "std": std}
    resize_to = math.floor(min(height, width) / crop_pct)
    if config.get("crop_mode") in ("squash", "border"):
        return Published(found, tuple(_differs(config["crop_mode"], resize_to, height, width)))
    return Published(found | {"resize": "shorter_side", "resize_to": max(height, width, resize_to)})


def _differs(crop_mode: str, resize_to: int, height: int, width: int) -> list[str]:
    """timm/data/transforms_factory.py, transforms_imagenet_eval: what the service's `exact` does otherwise."""
    if crop_mode == "border":
        return ["timm draws a border around what is not square; here the whole image is squeezed into the square"]
    if resize_to == min(height, width):
        return []
    return [f"timm squeezes the image into {resize_to} pixels and cuts off its edges; here nothing is cut off"]
