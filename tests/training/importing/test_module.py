"""`foldserve export PACKAGE.MODULE:FUNCTION`: a person's own network, with its checkpoint."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_support import SIDE, build_with_computed_weights, network
from safetensors.torch import save_file

from foldserve.cli import main
from service.artifact import Artifact
from service.engine import choose_device, open_engine

FUNCTION = "foreign_support:build_network"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "network.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network().state_dict().items()}, path)
    return path


def export(tmp_path: Path, *arguments: str, function: str = FUNCTION) -> int:
    return main(["export", function, "--name", "own", "--models", str(tmp_path / "models"), *arguments])


def test_a_module_and_its_checkpoint_become_an_artifact_that_answers_alike(tmp_path: Path, checkpoint: Path):
    flags = ["--checkpoint", str(checkpoint), "--size", str(SIDE), "--mean", "0.4", "--std", "0.3"]
    assert export(tmp_path, *flags) == 0
    artifact = Artifact.load(tmp_path / "models" / "own" / "1")
    assert [record.norm for record in artifact.manifest.folds] == ["bn1", "bn2"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    logits = open_engine(artifact.model_bytes, choose_device("cpu")).run(pixels)
    with torch.no_grad():
        wanted = network().double()((torch.from_numpy(pixels.transpose(0, 3, 1, 2)).double() / 255 - 0.4) / 0.3)
    assert np.abs(logits - wanted.numpy()).max() <= 1e-5  # float32 on logits below 10


def test_weights_that_are_computed_anew_for_each_batch_are_computed_once_and_fold(tmp_path: Path):
    built = build_with_computed_weights().eval()
    torch.save(built.state_dict(), tmp_path / "computed.pt")
    flags = ["--checkpoint", str(tmp_path / "computed.pt"), "--size", str(SIDE)]
    assert export(tmp_path, *flags, function="foreign_support:build_with_computed_weights") == 0
    artifact = Artifact.load(tmp_path / "models" / "own" / "1")
    assert [record.norm for record in artifact.manifest.folds] == ["bn1", "bn2"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    logits = open_engine(artifact.model_bytes, choose_device("cpu")).run(pixels)
    with torch.no_grad():
        wanted = built(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float() / 255)
    assert np.abs(logits - wanted.numpy()).max() <= 1e-4 * np.abs(logits).max()


def test_a_batchnorm_that_activates_too_folds_though_it_asks_for_a_rank(tmp_path: Path, checkpoint: Path):
    flags = ["--checkpoint", str(checkpoint), "--size", str(SIDE)]
    assert export(tmp_path, *flags, function="foreign_support:build_with_activating_norms") == 0
    artifact = Artifact.load(tmp_path / "models" / "own" / "1")
    assert [record.norm for record in artifact.manifest.folds] == ["bn1.norm", "bn2.norm"]


def test_a_size_that_does_not_suit_the_network_is_refused_in_one_line(tmp_path: Path, checkpoint: Path, capsys):
    assert export(tmp_path, "--checkpoint", str(checkpoint), "--size", "2") == 1
    refusal = capsys.readouterr().err
    assert re.fullmatch(
        r"foldserve: the network cannot take images of shape \(2, 3, 2, 2\): .*; is --size right\?\n", refusal
    )


def _never_updated(state):
    state["bn1.num_batches_tracked"].zero_()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_never_updated, "never updated"),
        (lambda state: state.pop("bn1.running_var"), "running statistics are missing"),
        (lambda state: state.pop("head.weight"), "does not fit"),
    ],
    ids=["never updated", "no statistics", "another network"],
)
def test_a_checkpoint_that_would_answer_wrongly_is_refused(tmp_path: Path, capsys, damage, words: str):
    state = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    damage(state)
    save_file(state, tmp_path / "bad.safetensors")
    assert export(tmp_path, "--checkpoint", str(tmp_path / "bad.safetensors"), "--size", str(SIDE)) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("no.such.module:build", "there is no module"),
        ("foreign_support:nothing", "nothing"),
        ("foreign_support:Graph", "returned a Graph"),
    ],
)
def test_a_function_that_gives_no_module_is_wrong_usage(tmp_path: Path, checkpoint: Path, capsys, function, words):
    assert export(tmp_path, "--checkpoint", str(checkpoint), function=function) == 2
    assert words in capsys.readouterr().err


def test_a_module_without_a_checkpoint_is_wrong_usage(tmp_path: Path, capsys):
    assert export(tmp_path) == 2
    assert "--checkpoint" in capsys.readouterr().err
