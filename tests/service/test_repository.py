"""models/<name>/<version>/: what is found there, which version wins, and what is refused."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from support import CPU, TinyModel

from service.engine import open_engine
from service.errors import ArtifactError, InferenceFailed
from service.repository import Repository, versions


class NotFinite:
    def run(self, images, threads=1):
        return np.array([[0.0, np.nan, 1.0]], np.float32)


@pytest.fixture
def root(tmp_path):
    for version in (1, 2, 10):
        TinyModel().write(tmp_path, version)
    TinyModel(mode="L", name="gray").write(tmp_path)
    return tmp_path


@pytest.fixture
def repository(root):
    return Repository(root, open_engine)


def test_names_are_the_folders_with_a_version(root, repository):
    (root / "empty").mkdir()
    (root / "notes").mkdir()
    (root / "notes" / "draft").mkdir()
    (root / "README.md").write_text("about these models")

    assert repository.names() == ["gray", "tiny"]


@pytest.mark.parametrize("name", [".trash", "my model"])
def test_folders_that_cannot_be_models_are_not_listed(root, repository, name):
    shutil.copytree(root / "gray", root / name)

    assert repository.names() == ["gray", "tiny"]  # what is listed can be loaded


def test_the_highest_version_wins_as_a_number(repository):
    assert repository.load("tiny", CPU).version == 10


def test_a_version_can_be_asked_for(repository):
    assert repository.load("tiny", CPU, version=2).version == 2


@pytest.mark.parametrize("name", ["latest", "0", "-1", "1.5", "01", "v3", " 4"])
def test_folders_that_are_no_positive_integer_are_ignored(root, name):
    (root / "tiny" / name).mkdir()

    assert versions(root / "tiny") == [1, 2, 10]


def test_a_file_is_no_version(root):
    (root / "tiny" / "99").write_text("not a folder")

    assert versions(root / "tiny") == [1, 2, 10]


@pytest.mark.parametrize("name", ["dog", "../tiny", "..", "", "tiny/1", "/etc", "tiny/../tiny", "a" * 101])
def test_a_name_that_is_not_there_or_leaves_the_folder_is_refused(repository, name):
    with pytest.raises(ArtifactError, match="holds no model"):
        repository.load(name, CPU)


def test_a_version_that_is_not_there_is_refused(repository):
    with pytest.raises(ArtifactError, match="tiny holds no version 3; it has 1, 2, 10"):
        repository.load("tiny", CPU, version=3)


def test_a_missing_folder_is_told_with_the_flag(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder; name the model repository with --models"):
        Repository(tmp_path / "nowhere", open_engine).names()


def test_an_empty_folder_is_told_with_what_it_should_hold(tmp_path):
    with pytest.raises(ArtifactError, match=r"<name>/<version>/model.onnx"):
        Repository(tmp_path, open_engine).names()


def test_a_model_that_fails_its_golden_images_is_not_loaded(root, repository):
    other = TinyModel(seed=2).golden().to_bytes()
    (root / "tiny" / "10" / "golden.npz").write_bytes(other)

    with pytest.raises(ArtifactError, match=r"tiny/10/model.onnx: golden image \d"):
        repository.load("tiny", CPU)


def test_a_loaded_model_knows_what_its_golden_images_showed(repository):
    model = repository.load("tiny", CPU)

    assert model.golden_images == 8
    assert 0 < model.golden_difference <= TinyModel().golden().tolerance


def test_logits_that_are_not_finite_are_never_handed_on(repository):
    model = repository.load("gray", CPU)

    with pytest.raises(InferenceFailed, match="not finite"):
        replace(model, engine=NotFinite()).run(np.zeros((1, 8, 8, 1), np.uint8))
