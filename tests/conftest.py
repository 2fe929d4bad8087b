"""Fixtures for every test: an environment without settings, and a small model repository."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support import TinyModel

settings.register_profile("patient", deadline=None)  # speed is never asserted here, and a busy machine has little
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state folder of this session, also for fixtures that live longer than a test."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDSERVE_STATE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, state: Path) -> None:
    outside = [name for name in os.environ if name.startswith("FOLDSERVE_")]
    for variable in sorted(set(outside) - {"FOLDSERVE_DATA"}):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("FOLDSERVE_STATE", str(state))  # certificates of tests are nobody else's


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one tiny RGB model; nobody writes to it."""
    folder = tmp_path_factory.mktemp("models")
    TinyModel().write(folder)
    return folder
