"""Fixtures for every test: an environment without settings, and a small model repository."""

import os
from pathlib import Path

import pytest
from support import TinyModel


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = [name for name in os.environ if name.startswith("FOLDSERVE_")]
    for variable in sorted(set(outside) - {"FOLDSERVE_DATA"}):
        monkeypatch.delenv(variable)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one tiny RGB model; nobody writes to it."""
    folder = tmp_path_factory.mktemp("models")
    TinyModel().write(folder)
    return folder
