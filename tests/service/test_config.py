"""Settings: flags over environment over defaults, and one line for what is wrong."""

import argparse
import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from service import commands
from service.config import Settings, cpu_count
from service.errors import ConfigurationError


def test_the_defaults_are_those_of_the_design():
    settings = Settings.load()

    assert settings.max_body_bytes == 20 * 2**20
    assert settings.max_image_pixels == 50_000_000
    assert settings.max_images == 64
    assert settings.max_queue_size == 512
    assert settings.request_timeout_s == 10
    assert settings.drain_timeout_s == 30
    assert settings.max_queue_delay_ms == 0


def test_the_environment_wins_over_defaults(monkeypatch):
    monkeypatch.setenv("FOLDSERVE_PORT", "9000")
    monkeypatch.setenv("FOLDSERVE_MODELS", "/somewhere")

    assert (Settings.load().port, Settings.load().models) == (9000, Path("/somewhere"))


def test_flags_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("FOLDSERVE_PORT", "9000")

    assert Settings.load(port="9001", host=None).port == 9001


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Settings.load().port = 1


def test_formats_are_split_at_commas(monkeypatch):
    monkeypatch.setenv("FOLDSERVE_FORMATS", "png, jpeg")

    assert Settings.load().formats == ("PNG", "JPEG")


def test_an_unknown_variable_is_warned_about_with_the_nearest_name(monkeypatch, caplog):
    monkeypatch.setenv("FOLDSERVE_PROT", "9000")

    with caplog.at_level(logging.WARNING):
        Settings.load()

    assert [record.getMessage() for record in caplog.records] == [
        "environment variable FOLDSERVE_PROT is not a setting (did you mean FOLDSERVE_PORT?)"
    ]


def test_known_variables_are_not_warned_about(monkeypatch, caplog):
    monkeypatch.setenv("FOLDSERVE_PORT", "9000")
    monkeypatch.setenv("FOLDSERVE_DATA", "/data")

    Settings.load()

    assert not caplog.records


@pytest.mark.parametrize(
    "name, value",
    [
        ("port", "70000"),
        ("port", "http"),
        ("device", "tpu"),
        ("max_batch_size", "0"),
        ("max_queue_size", "0"),
        ("request_timeout_s", "0"),
        ("body_timeout_s", "-1"),
        ("max_queue_delay_ms", "-1"),
        ("request_timeout_s", "inf"),
        ("body_timeout_s", "inf"),
        ("drain_timeout_s", "inf"),
        ("max_queue_delay_ms", "inf"),
        ("drain_timeout_s", "nan"),
        ("log_level", "loud"),
    ],
)
@pytest.mark.parametrize("source", ["flag", "environment"])
def test_a_wrong_value_is_one_line_that_names_where_it_came_from(name, value, source, monkeypatch):
    if source == "environment":
        monkeypatch.setenv(f"FOLDSERVE_{name.upper()}", value)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(**({name: value} if source == "flag" else {}))

    where = f"--{name.replace('_', '-')}" if source == "flag" else f"FOLDSERVE_{name.upper()}"
    assert str(caught.value).startswith(f"{where} = {value}: ")
    assert "\n" not in str(caught.value)


def test_every_wrong_value_is_told():
    with pytest.raises(ConfigurationError, match=r"--port = 70000: .*; --lanes = -1: "):
        Settings.load(port="70000", lanes="-1")


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"max_images": 10, "max_queue_size": 9}, r"max_images \(10\) may not exceed max_queue_size \(9\)"),
        (
            {"max_body_bytes": 10, "max_bytes_in_flight": 9},
            r"max_body_bytes \(10\) may not .* max_bytes_in_flight \(9\)",
        ),
        (
            {"max_image_pixels": 10, "max_pixels_in_flight": 9},
            r"max_image_pixels \(10\) may not .* max_pixels_in_flight \(9\)",
        ),
    ],
)
def test_limits_under_which_no_request_of_the_largest_size_could_pass_are_one_line(flags, words):
    with pytest.raises(ConfigurationError, match=words) as caught:
        Settings.load(**flags)

    assert "\n" not in str(caught.value)
    assert Settings.load(**dict.fromkeys(flags, 10))


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(ConfigurationError, match="--prot = 1"):
        Settings.load(prot="1")


def test_every_setting_has_a_description_and_all_but_secrets_a_flag():
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    flags = {name: f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    shown = parser.parse_args(["serve"])

    for name, field in Settings.model_fields.items():
        assert field.description, name
        if name == "receipt_key":  # a flag would show it in the list of processes
            assert not hasattr(shown, name)
            continue
        assert getattr(shown, name) is None, flags[name]  # absent flags leave the word to the environment


def test_cores_are_those_that_this_process_may_use():
    assert cpu_count() >= 1


def test_a_setting_that_is_on_by_default_can_be_switched_off_by_a_flag():
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())

    flags = [vars(parser.parse_args(["serve", *words]))["share_identical"] for words in ([], ["--no-share-identical"])]

    assert flags == [None, False]


@pytest.mark.parametrize(
    ("setting", "wrong", "right"),
    [
        ("cors_origins", "evil", "https://a.example,http://localhost:3000,*"),
        ("cors_origins", "https://a.example/", "https://a.example"),
        ("otlp_endpoint", "collector:4318", "http://collector:4318/v1/traces"),
    ],
)
def test_an_address_that_can_never_be_one_is_refused_with_a_right_one(setting, wrong, right):
    assert Settings.load(**{setting: right})
    with pytest.raises(ConfigurationError, match=r"^--[a-z-]+ = .*; write it as .*https://") as caught:
        Settings.load(**{setting: wrong})
    assert "alue error" not in str(caught.value)
