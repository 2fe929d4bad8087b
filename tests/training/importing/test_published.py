"""The presets are what torchvision publishes, and timm's configurations are read as timm reads them.

The two data files were written by `benchmarks/published.py` from the packages themselves; where those are installed,
the files are held against them.
"""

import json
from pathlib import Path

import pytest

from training.errors import UsageError
from training.importing.preprocessing import Wishes, choose
from training.importing.published import published, torchvision_presets

DATA = Path(__file__).parents[2] / "data"
TORCHVISION = json.loads((DATA / "torchvision_preprocessing.json").read_text())
TIMM = json.loads((DATA / "timm_preprocessing.json").read_text())
FEATURES = "vgg16.imagenet1k_features"  # weights without a head: they classify nothing


@pytest.mark.parametrize("name", [name for name in TORCHVISION if name != FEATURES])
def test_every_preset_is_what_torchvision_publishes(name: str):
    row = TORCHVISION[name]
    spec, _ = choose(Wishes(name), 3, None)
    assert (spec.resize, spec.resize_to, spec.size, spec.filter) == (
        "shorter_side", row["resize"], (row["crop"], row["crop"]), row["filter"],
    )  # fmt: skip
    assert (list(spec.mean), list(spec.std)) == (row["mean"], row["std"])


def test_a_network_alone_means_its_default_weights():
    defaults = {name for name, row in TORCHVISION.items() if row["default"]}
    presets = torchvision_presets()
    assert {name for name in defaults if presets[name.partition(".")[0]] != presets[name]} == set()
    assert len(presets) == len(TORCHVISION) - 1 + len(defaults) + 2  # without FEATURES; two for ImageNet alone


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("ResNet50_Weights.IMAGENET1K_V1", "resnet50.imagenet1k_v1"),
        ("EfficientNet_V2_S_Weights.DEFAULT", "efficientnet_v2_s"),
        ("RegNet_X_1_6GF_Weights.IMAGENET1K_V2", "regnet_x_1_6gf"),
        ("Swin_V2_B_Weights", "swin_v2_b"),
    ],
)
def test_torchvisions_own_spelling_of_weights_is_a_preset(spelled: str, name: str):
    assert published(spelled) == published(name)


@pytest.mark.parametrize("name", TIMM)
def test_a_pretrained_cfg_is_read_as_timm_reads_it(tmp_path: Path, name: str):
    row = TIMM[name]
    (tmp_path / "cfg.json").write_text(json.dumps(row["pretrained_cfg"]))
    spec, notes = choose(Wishes(str(tmp_path / "cfg.json")), 3, None)
    config = row["pretrained_cfg"]
    assert (list(spec.size), spec.filter) == (row["crop"], config["interpolation"])
    assert (list(spec.mean), list(spec.std)) == (config["mean"], config["std"])
    squeezed = config["crop_mode"] != "center"
    assert spec.resize == ("exact" if squeezed else "shorter_side")
    if not squeezed:
        assert spec.resize_to == row["resize"]
    same = not squeezed or (config["crop_mode"] == "squash" and row["resize"] == row["crop"])
    assert bool(notes) is not same, "what the service does otherwise is told, and only that"


def test_a_preset_that_is_none_names_the_nearest():
    with pytest.raises(UsageError, match=r"neither a file nor a preset \(did you mean resnet50\?\)"):
        published("resnet5")


def test_the_data_files_are_what_the_installed_packages_publish():
    """Skips where torchvision and timm are not installed; the other tests hold against the files."""
    from benchmarks.published import timm_transforms, torchvision_transforms
    from benchmarks.zoo import declare_missing_operators

    declared = declare_missing_operators()
    pytest.importorskip("torchvision", reason="torchvision is not installed: its presets are checked as written down")
    pytest.importorskip("timm", reason="timm is not installed: its configurations are checked as written down")
    found = torchvision_transforms()
    assert json.loads(json.dumps(found)) == TORCHVISION
    assert json.loads(json.dumps(timm_transforms())) == TIMM
    del declared
