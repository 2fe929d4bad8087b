"""`training.run` at the edges: a checkpoint that is gone, one of another epoch, a disk that is full."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from training_support import QUICK, disk_of, hush

from training.checkpoint import load_checkpoint, save_checkpoint
from training.errors import RunError
from training.report import read_metrics, recorder
from training.run import Trained, build_network, train


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


@pytest.mark.parametrize("left", ["best.safetensors", "result.json"])
def test_a_folder_that_holds_what_is_left_of_a_run_is_not_trained_over(tmp_path: Path, finished_run: Path, left: str):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished_run / left, run)
    before = contents(run)
    with pytest.raises(RunError, match=r"already holds a run; give --resume.*--overwrite"):
        train(replace(QUICK, epochs=1), run, say=hush)
    assert contents(run) == before


def test_a_result_describes_the_checkpoint_that_is_there(tmp_path: Path, finished_run: Path, trained: Trained):
    """Stopped between the two checkpoints of an epoch, a run's best and last differ in what they say is best."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    network = build_network(trained.config, trained.dataset)
    facts, _ = load_checkpoint(run / "best.safetensors", network)
    save_checkpoint(run / "best.safetensors", network, replace(facts, epoch=7, validation_accuracy=0.125))
    (run / "result.json").unlink()
    result = train(QUICK, run, resume=True, say=hush)
    assert (result["best_epoch"], result["validation_accuracy"]) == (7, 0.125)
    assert json.loads((run / "result.json").read_text()) == result


def test_a_disk_that_is_full_when_a_run_resumes_leaves_its_metrics(tmp_path: Path, finished_run: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = (run / "metrics.csv").read_bytes()
    with disk_of(10), pytest.raises(RunError, match=r"metrics\.csv cannot be written"), recorder(run, 2):
        pass
    assert (run / "metrics.csv").read_bytes() == before
    with recorder(run, 2):
        assert [row.epoch for row in read_metrics(run / "metrics.csv")] == [1, 2]


def test_resuming_a_finished_run_whose_last_checkpoint_is_gone_loses_nothing(tmp_path: Path, finished_run: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "last.safetensors").unlink()
    before = contents(run)
    with pytest.raises(RunError, match=r"last\.safetensors"):
        train(QUICK, run, resume=True, say=hush)
    assert contents(run) == before
