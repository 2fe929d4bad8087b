"""`--dry-run` and `--overfit`: everything is tried, nothing is written, and what cannot work is told."""

from dataclasses import replace
from pathlib import Path

import pytest
from training_support import QUICK, hush

from foldserve.cli import main
from training.errors import RunError, UsageError
from training.trial import dry_run, overfit


def test_a_dry_run_says_what_a_run_would_be_and_writes_nothing(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", "--dry-run", "--set", "device=cpu", "--set", "accumulate=4"]) == 0
    out = capsys.readouterr().out
    assert "a run takes 25 × 19 steps" in out
    assert "batches of 64 in 4 parts, of which BatchNorm sees 16 images at a time" in out
    assert list(tmp_path.iterdir()) == []


def test_one_epoch_on_one_thread_is_told_in_the_singular(capsys):
    dry_run(replace(QUICK, epochs=1, threads=1))
    assert ", 360 test images, 1 epoch, cpu" in capsys.readouterr().out


def test_a_dry_run_refuses_what_a_run_would(capsys):
    with pytest.raises(UsageError, match="batch_size = 138"):
        dry_run(replace(QUICK, batch_size=138), say=hush)


def test_a_sound_configuration_learns_ten_images_by_heart_in_both_modes(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", "--overfit", "10", "--set", "device=cpu"]) == 0
    assert "100% by batch statistics" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_images_that_there_are_are_counted_where_more_are_asked_for():
    told: list[str] = []
    overfit(QUICK, 5000, say=told.append)
    assert told[0].startswith("137 images, ")


def test_a_network_that_cannot_learn_is_told(monkeypatch):
    from training import trial

    monkeypatch.setattr(trial, "OVERFIT_STEPS", 1)
    with pytest.raises(RunError, match="cannot learn 60 images by heart in 1 step; check"):
        overfit(QUICK, 60, say=hush)


@pytest.mark.parametrize("count", ["1", "0", "-3"])
def test_fewer_than_two_images_are_refused(capsys, count: str):
    assert main(["train", "digits", "--overfit", count]) == 2
    assert "BatchNorm needs at least 2 images" in capsys.readouterr().err
