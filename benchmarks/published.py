"""Write down what torchvision and timm publish as preprocessing: `python -m benchmarks.published tests/data`.

The two files are what `training.importing.published` is held against where neither package is installed. Needs
torch, torchvision and timm; nothing is downloaded, weights least of all.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.zoo import declare_missing_operators

TIMM = (
    "resnet50.a1_in1k", "resnet18.tv_in1k", "mobilenetv3_small_050.lamb_in1k", "efficientnet_lite0.ra_in1k",
    "tf_efficientnetv2_b0.in1k", "inception_v3.tf_in1k", "convnext_tiny.fb_in22k",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "eva02_tiny_patch14_336.mim_in22k_ft_in1k", "coat_lite_medium_384.in1k",
    "dm_nfnet_f0.dm_in1k", "deepseek_vit_412m.deepseek_v4_1_flash",
)  # fmt: skip
READ = (
    "input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "num_classes",
    "classifier",
    "first_conv",
)


def torchvision_transforms() -> dict[str, dict[str, Any]]:
    """Return what each of torchvision's classification weights does to an image, by `model.weights`."""
    from torchvision import models

    found = {}
    for name in models.list_models(module=models):
        weights = models.get_model_weights(name)
        for one in weights:
            does = one.transforms()
            found[f"{name}.{one.name.lower()}"] = {
                "resize": does.resize_size[0], "crop": does.crop_size[0], "filter": does.interpolation.value,
                "mean": does.mean, "std": does.std, "default": one is weights.DEFAULT,
            }  # fmt: skip
    return found


def timm_transforms() -> dict[str, dict[str, Any]]:
    """Return for some of timm's pretrained models its `pretrained_cfg`, and what timm's own transforms do with it."""
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    found = {}
    for name in TIMM:
        config = get_pretrained_cfg(name).to_dict()
        steps = create_transform(**resolve_data_config(pretrained_cfg=config)).transforms
        resize, crop = steps[0], steps[1]
        size = getattr(resize, "size", None)
        found[name] = {
            "pretrained_cfg": {key: config[key] for key in READ if key in config},
            "resize": size if isinstance(size, int) else list(size),
            "crop": list(crop.size),
            "steps": [type(one).__name__ for one in steps],
        }
    return found


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    declared = declare_missing_operators()
    for name, rows in (("torchvision", torchvision_transforms()), ("timm", timm_transforms())):
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
        (folder / f"{name}_preprocessing.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    del declared


if __name__ == "__main__":
    main()
