"""`training.run` at the edges: a checkpoint that is gone, one of another epoch, other data, a full disk."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from training_support import QUICK, disk_of, hush, write_photos

from foldserve.cli import main
from training.checkpoint import load_checkpoint, save_checkpoint
from training.errors import Diverged, RunError
from training.report import read_metrics, read_result, recorder
from training.run import Trained, build_network, load_run, train

PHOTOS = replace(QUICK, dataset="folder:photos", size=10, validation_images=4, workers=0, batch_size=4, epochs=1)


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


def test_resuming_a_run_that_is_over_leaves_every_file_and_what_was_measured(tmp_path: Path, finished_run: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    measured = json.loads((run / "result.json").read_text())
    measured |= {"compiled": True, "warm_up_seconds": 21.5, "device": "another", "date": "2026-01-01"}
    (run / "result.json").write_text(json.dumps(measured))
    before, told = contents(run), []
    assert train(QUICK, run, resume=True, say=told.append) == measured
    assert contents(run) == before
    assert told[-1] == f"the run is over; {run / 'result.json'} stays as it is"


def test_a_run_that_has_more_epochs_than_it_is_to_have_is_refused_and_loses_nothing(
    tmp_path: Path, finished_run: Path, capsys
):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "config.json").write_text(replace(QUICK, epochs=2).to_json())
    before = contents(run)
    assert main(["train", "digits", "--resume", "--out", str(run)]) == 1
    assert "asks for epochs = 2, and 3 are done; nothing was changed: with epochs = 3" in capsys.readouterr().err
    assert contents(run) == before


def test_a_stopped_run_ends_as_it_is_where_no_epoch_is_left_to_it(tmp_path: Path, finished_run: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "result.json").unlink()
    before = contents(run)
    result = train(QUICK, run, resume=True, say=hush)
    after = contents(run)
    assert (result["epochs"], json.loads(after["result.json"])) == (3, result)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("damage", [{"best_epoch": 9}, {"epochs": 2}, {"validation_accuracy": 1.0}, {"seconds": 0.01}])
def test_a_result_of_another_state_of_the_run_is_written_anew(tmp_path: Path, finished_run: Path, damage: dict):
    run = shutil.copytree(finished_run, tmp_path / "run")
    measured = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(measured | damage))
    again = train(QUICK, run, resume=True, say=hush)
    assert {name: again[name] for name in damage} == {name: measured[name] for name in damage}
    assert json.loads((run / "result.json").read_text()) == again


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_result_that_no_run_writes_is_written_anew(tmp_path: Path, finished_run: Path, content: str):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "result.json").write_text(content)
    again = train(QUICK, run, resume=True, say=hush)
    assert json.loads((run / "result.json").read_text()) == again


def test_a_run_that_ended_without_its_result_still_says_how_it_was_trained(tmp_path: Path, monkeypatch):
    from training import learner, loop

    run, config = tmp_path / "run", replace(QUICK, epochs=30, patience=1, compile="on")
    monkeypatch.setattr(learner.Learner, "_compile", lambda self, _: setattr(self, "is_compiled", True))
    monkeypatch.setattr(loop, "perf_counter", itertools.count(0.0, 30.0).__next__)
    result = train(replace(config, learning_rate=1e-9, warmup_share=0.0, bn_momentum=1.0), run, say=hush)
    assert len(read_metrics(run / "metrics.csv")) < 30
    assert (result["compiled"], result["warm_up_seconds"]) == (True, 30.0)
    (run / "result.json").unlink()
    monkeypatch.undo()
    again = train(config, run, resume=True, say=hush)
    assert {**again, "date": ""} == {**result, "date": ""}


def test_an_existing_run_is_refused_before_the_data_are_read(finished_run: Path):
    with pytest.raises(RunError, match="already holds a run"):
        train(replace(QUICK, dataset="mnist"), finished_run, data_dir=finished_run, say=hush)


def test_a_network_whose_validation_is_not_finite_is_never_best_and_the_run_ends_with_the_mend(tmp_path: Path):
    run = tmp_path / "run"
    config = replace(QUICK, epochs=1, batch_size=137, learning_rate=1e30, warmup_share=0.0)
    for is_resumed in (False, True):
        with pytest.raises(Diverged, match=r"not finite after any epoch; .* learning_rate lower than 1e\+30"):
            train(config, run, resume=is_resumed, say=hush)
    assert not (run / "best.safetensors").exists()
    assert not (run / "result.json").exists()


def test_another_optimizer_in_a_run_s_configuration_is_one_line(tmp_path: Path, finished_run: Path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "config.json").write_text(replace(QUICK, epochs=4, optimizer="adamw").to_json())
    assert main(["train", "digits", "--resume", "--out", str(run)]) == 1
    assert "last.safetensors holds momentum_buffer of another optimizer than AdamW" in capsys.readouterr().err


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


@pytest.fixture
def photo_run(tmp_path: Path) -> Path:
    """A finished run on a folder of photos, `photos` beside it."""
    write_photos(tmp_path / "photos")
    train(PHOTOS, tmp_path / "run", data_dir=tmp_path, say=hush)
    return tmp_path / "run"


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_run_is_not_told_or_exported_with_a_data_set_that_has_changed(photo_run: Path, command: str, capsys):
    data = photo_run.parent
    target = ["--name", "photos", "--models", str(data / "models")] if command == "export" else []
    write_photos(data / "more", count=3, seed=1)
    added = [
        shutil.copy(photo, data / "photos" / photo.parent.name / f"new-{photo.name}")
        for photo in (data / "more").rglob("*.png")
    ]
    before = contents(photo_run)
    assert main([command, str(photo_run), *target, "--data-dir", str(data)]) == 1
    assert re.search(r"best\.safetensors: the data set has changed since then; bring its", capsys.readouterr().err)
    assert contents(photo_run) == before
    assert not (data / "models").exists()
    for photo in added:
        photo.unlink()
    load_run(photo_run, data)


def test_a_run_that_does_not_say_what_it_was_trained_on_is_loaded(photo_run: Path):
    trained = load_run(photo_run, photo_run.parent)
    assert trained.facts.data == trained.dataset.digest()
    network = build_network(trained.config, trained.dataset)
    facts, _ = load_checkpoint(photo_run / "best.safetensors", network)
    save_checkpoint(photo_run / "best.safetensors", network, replace(facts, data=""))
    (photo_run.parent / "photos" / "cat" / "0.png").unlink()
    assert load_run(photo_run, photo_run.parent).facts.data == ""


def test_data_are_compared_before_a_network_of_another_shape_would_be_blamed(photo_run: Path):
    write_photos(photo_run.parent / "photos", classes=("owl",))
    with pytest.raises(RunError, match=r"last\.safetensors: the data set has changed since then"):
        train(PHOTOS, photo_run, data_dir=photo_run.parent, resume=True, say=hush)
    with pytest.raises(RunError, match=r"best\.safetensors: the data set has changed since then"):
        load_run(photo_run, photo_run.parent)


def test_a_damaged_result_is_told_from_one_that_is_missing_and_is_written_anew(tmp_path: Path, finished_run: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    whole = read_result(run)
    (run / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"result\.json is damaged; --resume of the run writes it anew"):
        load_run(run)
    train(QUICK, run, resume=True, say=hush)
    assert read_result(run)["test_accuracy"] == whole["test_accuracy"]
