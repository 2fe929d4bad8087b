"""How pixels are prepared: torchvision's presets, timm's configurations, flags, and what contradicts the model."""

import json
from pathlib import Path

import pytest

from training.errors import UsageError
from training.importing.preprocessing import Wishes, choose


def test_a_torchvision_preset_gives_its_published_values():
    spec, notes = choose(Wishes("resnet50"), 3, None)
    assert (spec.resize, spec.resize_to, spec.size, spec.filter) == ("shorter_side", 232, (224, 224), "bilinear")
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert notes == ()


def test_timms_pretrained_cfg_is_read_bare_and_inside_a_config(tmp_path: Path):
    config = {
        "input_size": [3, 160, 160], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    for content in (config, {"architecture": "x", "pretrained_cfg": config}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        spec, _ = choose(Wishes(str(tmp_path / "config.json")), 3, (160, 160))
        # timm's transforms: floor(160 / 0.9) = 177
        assert (spec.resize_to, spec.size, spec.filter, spec.mean) == (177, (160, 160), "bicubic", (0.5, 0.5, 0.5))


@pytest.mark.parametrize("said", [{}, {"interpolation": None}], ids=["no key", "null"])
def test_a_pretrained_cfg_without_a_filter_means_bicubic(tmp_path: Path, said: dict[str, None]):
    """As in resolve_data_config of timm, which starts from bicubic, and passes over what is null."""
    config = {"input_size": [3, 160, 160], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (tmp_path / "config.json").write_text(json.dumps(config | said))
    spec, _ = choose(Wishes(str(tmp_path / "config.json")), 3, None)
    assert spec.filter == "bicubic"


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        (Wishes("resnet5"), "did you mean resnet50"),
        (Wishes("resnet50"), "takes 12 × 12 pixels, not 224 × 224"),
        (Wishes(size=13), "takes 12 × 12 pixels, not 13 × 13"),
        (Wishes(mean=(0.1, 0.2)), "mean and std need as many values as mode RGB has channels, 3"),
        (Wishes(std=(0.0,)), "std must be positive"),
    ],
)
def test_preprocessing_that_cannot_be_is_wrong_usage(wishes: Wishes, words: str):
    with pytest.raises(UsageError, match=words):
        choose(wishes, 3, (12, 12))


@pytest.mark.parametrize(
    "content",
    ["3", "null", "[]", "{}", "{", '{"pretrained_cfg": 4}', '{"input_size": [3, "a", 2], "mean": [0], "std": [1]}'],
)
def test_what_is_no_pretrained_cfg_is_told_what_one_holds(tmp_path: Path, content: str):
    (tmp_path / "cfg.json").write_text(content)
    with pytest.raises(UsageError, match=r"cfg\.json is not timm's pretrained_cfg: expected JSON with input_size, as"):
        choose(Wishes(str(tmp_path / "cfg.json")), 3, None)
