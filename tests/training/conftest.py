"""Fixtures of the training tests. What is slow, a run and its artifact, is made once a session."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_support import QUICK, one_thread, quick_export, quick_run, quick_trained

from service.preprocessing import encode_png
from training.data import load
from training.packaging import Exported
from training.run import Trained


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _no_data_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test finds a data set, or leaves one, on the machine that runs it."""
    monkeypatch.delenv("FOLDSERVE_DATA", raising=False)
    monkeypatch.setenv("FOLDSERVE_STATE", str(tmp_path / "state"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this session."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def finished_run(base: Path) -> Path:
    """The folder of a finished run; not to be written to."""
    return quick_run(base)


@pytest.fixture(scope="session")
def trained(base: Path) -> Trained:
    """A finished run, loaded; not to be changed."""
    return quick_trained(base)


@pytest.fixture(scope="session")
def exported(base: Path) -> Exported:
    """Its artifact, models/digits/1; not to be written to."""
    return quick_export(base)


@pytest.fixture(scope="session")
def domain_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `negative` lies, the digits, black on white, as an image folder; not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    digits = load(replace(QUICK, validation_images=300))
    for part in (digits.training, digits.validation, digits.test):
        for image, target in zip(part.images, part.targets, strict=True):
            path = folder / "negative" / str(target)
            path.mkdir(parents=True, exist_ok=True)
            (path / f"{len(list(path.iterdir()))}.png").write_bytes(encode_png(255 - image))
    return folder


@pytest.fixture
def _free_again() -> Iterator[None]:
    """Let operations that are not deterministic be allowed after the test, however it ends."""
    yield
    torch.use_deterministic_algorithms(mode=False)
