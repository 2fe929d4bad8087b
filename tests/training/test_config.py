"""`training.config` and `training.presets`: where a configuration comes from, and which are refused."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_support import QUICK

from training.architectures import ARCHITECTURES
from training.config import TrainConfig, parse_assignments, read_config_file
from training.data import dataset_names
from training.environment import data_folders, default_models
from training.errors import UsageError
from training.presets import PRESETS, preset

LEAST = {"dataset": "digits", "architecture": "small_cnn", "epochs": 3}


def test_assignments_take_the_type_of_their_key():
    changed = QUICK.with_values(parse_assignments(["epochs=7", "learning_rate = 1e-3", "momentum=0", "dataset=mnist"]))
    assert (changed.epochs, changed.learning_rate, changed.momentum, changed.dataset) == (7, 1e-3, 0.0, "mnist")
    assert type(changed.momentum) is float


@pytest.mark.parametrize(("decay", "momentum"), [("0.9", 0.1), ("0.999", 0.001), (0.99, 0.01)])
def test_tensorflows_decay_is_one_minus_pytorchs_momentum(decay: object, momentum: float):
    assert QUICK.with_values({"bn_decay": decay}).bn_momentum == momentum


def test_decay_and_momentum_together_are_refused():
    with pytest.raises(UsageError, match="bn_decay and bn_momentum are one key"):
        QUICK.with_values({"bn_decay": "0.9", "bn_momentum": "0.1"})


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False)])
def test_a_switch_is_true_or_false(text: str, value: bool):
    assert QUICK.with_values({"flip": text}).flip is value
    with pytest.raises(UsageError, match="flip = yes: expected true or false"):
        QUICK.with_values({"flip": "yes"})


def test_of_two_assignments_the_later_wins():
    assert parse_assignments(["seed=1", "seed=2"]) == {"seed": "2"}


def test_a_value_may_contain_an_equals_sign():
    assert parse_assignments(["dataset=a=b"]) == {"dataset": "a=b"}


def test_an_assignment_without_equals_sign_is_refused():
    with pytest.raises(UsageError, match="--set epochs: expected KEY=VALUE"):
        parse_assignments(["epochs"])


def test_an_unknown_key_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"learning_rat is not a configuration key \(did you mean learning_rate\?\)"):
        QUICK.with_values({"learning_rat": "1"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", "1.5"),
        ("epochs", "many"),
        ("epochs", 1.5),
        ("epochs", True),
        ("epochs", None),
        ("learning_rate", "fast"),
        ("learning_rate", True),
        ("learning_rate", [0.1]),
        ("dataset", 3),
    ],
)
def test_a_value_of_another_type_is_refused_by_key(key: str, value: object):
    with pytest.raises(UsageError, match=rf"{key} = .*: expected"):
        QUICK.with_values({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("validation_images", 0),
        ("learning_rate", 0.0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("bn_momentum", 0.0),
        ("bn_momentum", 1.5),
        ("momentum", -0.1),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("label_smoothing", 1.5),
        ("warmup_share", -0.1),
        ("warmup_share", 1.0),
        ("translate", -1.0),
        ("seed", -1),
        ("seed", 2**63),
        ("device", "tpu"),
        ("precision", "float8"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_key(key: str, value: object):
    with pytest.raises(UsageError, match=rf"{key} = .*: expected"):
        replace(QUICK, **{key: value})


def test_alternating_flips_without_flips_are_refused():
    with pytest.raises(UsageError, match="alternate_flip = true says how flip = true mirrors"):
        QUICK.with_values({"alternate_flip": True})
    assert QUICK.with_values({"flip": True, "alternate_flip": True}).alternate_flip


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_a_file_gives_keys_and_values(tmp_path: Path, suffix: str):
    path = tmp_path / f"mine{suffix}"
    path.write_text('{"epochs": 4, "momentum": 1e-1}' if suffix == ".json" else "epochs = 4\nmomentum = 1e-1\n")
    assert read_config_file(path) == {"epochs": 4, "momentum": 0.1}


@pytest.mark.parametrize(
    ("name", "content"),
    [("broken.json", b"{epochs: 4"), ("broken.toml", b"epochs: 4"), ("list.json", b"[1]"), ("bytes.json", b"\xff\xfe")],
)
def test_a_file_that_is_not_keys_and_values_is_refused_by_name(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        read_config_file(tmp_path / name)


def test_a_file_that_is_missing_is_refused_by_name(tmp_path: Path):
    with pytest.raises(UsageError, match=r"none\.toml"):
        read_config_file(tmp_path / "none.toml")


@given(
    st.builds(
        replace,
        st.sampled_from([QUICK, *PRESETS.values()]),
        epochs=st.integers(1, 10**6),
        learning_rate=st.floats(1e-6, 1e3),
        seed=st.integers(0, 2**31 - 1),
        device=st.sampled_from(["auto", "cuda", "cpu"]),
    )
)
def test_a_configuration_survives_json(config: TrainConfig):
    assert TrainConfig.from_mapping(json.loads(config.to_json())) == config


def test_keys_that_are_missing_are_named():
    with pytest.raises(UsageError, match="missing architecture, epochs"):
        TrainConfig.from_mapping({"dataset": "digits"})


def test_keys_that_are_not_given_have_their_defaults():
    config = TrainConfig.from_mapping(LEAST)
    assert config == TrainConfig("digits", "small_cnn", 3)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_each_preset_can_show_images_as_they_are(name: str):
    still = PRESETS[name].unchanged_images()
    changes = (still.translate, still.rotate, still.scale, still.flip, still.alternate_flip, still.cutout)
    assert not any((*changes, still.label_smoothing))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_each_preset_names_a_dataset_and_a_network_that_exist(name: str):
    names = preset(name).dataset.split("+")
    assert all(name in dataset_names() or name.startswith("folder:") for name in names)
    assert preset(name).architecture in ARCHITECTURES


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"digit is not a preset \(did you mean digits\?\)"):
        preset("digit")


def test_the_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    downloads = tmp_path / "state" / "data"
    assert data_folders(None) == [downloads]
    monkeypatch.setenv("FOLDSERVE_DATA", "/somewhere")
    assert data_folders(None) == [Path("/somewhere"), downloads]
    assert data_folders(Path("here")) == [Path("here"), downloads]


def test_every_number_has_a_field_that_is_typed():
    assert {field.type for field in fields(TrainConfig)} == {int, float, str, bool}


def test_the_repository_is_the_services_own_where_no_flag_names_one(monkeypatch):
    monkeypatch.delenv("FOLDSERVE_MODELS", raising=False)
    assert default_models() == Path("models")
    monkeypatch.setenv("FOLDSERVE_MODELS", "/volume")
    assert default_models() == Path("/volume")


def test_a_misspelt_key_is_told_before_the_one_that_is_missing_for_it():
    with pytest.raises(UsageError, match=r"epocs is not a configuration key \(did you mean epochs\?\)"):
        TrainConfig.from_mapping({"dataset": "digits", "architecture": "small_cnn", "epocs": 3})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "c.yaml",
            r"c\.yaml: .*; expected JSON, which every file is read as that is not named \*\.toml",
        ),
        ("c.toml", r"c\.toml: .*; expected TOML$"),
        ("", "cannot be read: Is a directory$"),
    ],
)
def test_a_configuration_file_that_is_none_says_what_was_expected(tmp_path: Path, name: str, words: str):
    if name:
        (tmp_path / name).write_text("epochs: 3")
    with pytest.raises(UsageError, match=words):
        read_config_file(tmp_path / name)
