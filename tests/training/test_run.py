"""`training.run`: what a run leaves, how it is chosen, and how it goes on after it was stopped."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_support import IDX_STEMS, QUICK, StopsAfterFirstEpoch, hush, idx_bytes, idx_files, idx_source, write_idx

from training import data
from training.config import TrainConfig
from training.data import load
from training.environment import prepare_arithmetic
from training.errors import RunError, UsageError
from training.loop import Batches, Normalize, evaluate
from training.normalization import batch_norms
from training.report import EpochRow, read_metrics
from training.run import Trained, load_run, pixel_statistics, read_config, train

TINY = replace(QUICK, dataset="tiny", batch_size=8, validation_images=12, epochs=2, translate=0.0)


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: row[name] for name in row if name not in {"seconds", "images_per_second"}} for row in rows]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Publish and write a tiny data set; its arguments replace the content of files."""

    def publish(**changed: np.ndarray) -> Path:
        contents = idx_files()
        for name, values in changed.items():
            contents[name.replace("_", "-")] = idx_bytes(values)
        monkeypatch.setitem(data.IDX_SOURCES, "tiny", idx_source(contents))
        return write_idx(tmp_path / f"data-{len(list(tmp_path.iterdir()))}" / "tiny", contents).parent

    return publish


def test_a_run_folder_holds_the_documented_files(finished_run: Path):
    names = {path.name for path in finished_run.iterdir()}
    documented = {"config.json", "metrics.csv", "result.json", "best.safetensors", "last.safetensors"}
    assert documented < names
    assert all(name.startswith("events.out.tfevents.") for name in names - documented)
    assert names - documented, "TensorBoard's file is there"


def test_tensorboard_reads_each_epoch_s_figures_and_the_drift_of_every_batchnorm(finished_run: Path, trained: Trained):
    events = EventAccumulator(str(finished_run)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(row.epoch, pytest.approx(row.train_loss)) for row in read_metrics(finished_run / "metrics.csv")]
    for name, _ in batch_norms(trained.network):
        drifts = [event.value for event in events.Scalars(f"batchnorm/{name}/mean_drift")]
        assert len(drifts) == len(losses) - 1
        assert min(drifts) > 0


def test_metrics_have_one_row_an_epoch_with_every_column(finished_run: Path):
    rows = rows_of(finished_run)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert list(rows[0]) == [field.name for field in fields(EpochRow)]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_a_run_does_not_go_on_with_another_data_set(tmp_path: Path, tiny: Callable[..., Path]):
    run = tmp_path / "run"
    train(TINY, run, data_dir=tiny(), say=hush)
    with pytest.raises(RunError, match="the data set has changed since then; bring its images and labels back"):
        train(TINY, run, data_dir=tiny(train_labels_idx1_ubyte=np.arange(30)[::-1] % 3), resume=True, say=hush)
    train(TINY, run, data_dir=tiny(), resume=True, say=hush)


def test_a_configuration_comes_back_as_it_was(finished_run: Path):
    assert read_config(finished_run) == QUICK


def test_a_result_says_what_was_trained_on_what_and_how_well(finished_run: Path):
    result = json.loads((finished_run / "result.json").read_text())
    assert (result["dataset"], result["architecture"], result["seed"], result["epochs"]) == (
        "digits", "small_cnn", 0, 3,
    )  # fmt: skip
    assert result["test_images"] == 360
    assert 1 <= result["best_epoch"] <= 3
    assert "1300 for validation" in result["split"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert {"foldserve", "torch", "python"} <= set(result["versions"])


def test_the_test_accuracy_is_that_of_the_best_checkpoint(finished_run: Path, trained: Trained):
    result = json.loads((finished_run / "result.json").read_text())
    normalize = Normalize(trained.pixels.mean, trained.pixels.std)
    model = torch.nn.Sequential(normalize, trained.network).float()
    cpu = torch.device("cpu")
    assert evaluate(model, Batches.on(cpu, trained.dataset.test)).accuracy == result["test_accuracy"]
    assert evaluate(model, Batches.on(cpu, trained.dataset.validation)).accuracy == result["validation_accuracy"]
    assert not trained.network.training


def test_the_best_epoch_has_the_highest_validation_accuracy(finished_run: Path):
    result = json.loads((finished_run / "result.json").read_text())
    accuracies = [float(row["validation_accuracy"]) for row in rows_of(finished_run)]
    assert accuracies[result["best_epoch"] - 1] == max(accuracies) == result["statistics_compared"]["corrected"]
    assert result["validation_accuracy"] == max(result["statistics_compared"].values())


def test_best_stays_where_later_epochs_are_worse(tmp_path: Path, tiny):
    # trained on noise, validated on noise: the best of 8 epochs is somewhere, and later ones must not replace it
    run = tmp_path / "run"
    config = replace(TINY, epochs=8, learning_rate=0.2)
    result = train(config, run, data_dir=tiny(), say=hush)
    accuracies = [float(row["validation_accuracy"]) for row in rows_of(run)]
    assert result["validation_accuracy"] == max(accuracies)
    assert accuracies[result["best_epoch"] - 1] == max(accuracies)
    assert min(accuracies) < max(accuracies), "with all epochs equal this test would show nothing"
    best = load_run(run, next(tmp_path.glob("data-*")))
    model = torch.nn.Sequential(Normalize(best.pixels.mean, best.pixels.std), best.network).float()
    assert evaluate(model, Batches.on(torch.device("cpu"), best.dataset.validation)).accuracy == max(accuracies)


def test_the_test_set_decides_nothing_but_the_test_accuracy(tmp_path: Path, tiny):
    labels = IDX_STEMS[3].replace("-", "_")
    runs = [tmp_path / f"all-{label}" for label in range(3)]
    results = [
        train(TINY, run, data_dir=tiny(**{labels: np.full(9, label)}), say=hush) for label, run in enumerate(runs)
    ]
    for run in runs[1:]:
        assert without_times(rows_of(run)) == without_times(rows_of(runs[0]))
        for file in ("best.safetensors", "last.safetensors"):
            mine, theirs = tensors_of(run / file), tensors_of(runs[0] / file)
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for result in results[1:]:
        assert {key for key in result if result[key] != results[0][key]} <= {"test_accuracy", "seconds"}
    # each image gets one of the three labels, so each is right in exactly one of the three runs
    assert sum(result["test_accuracy"] for result in results) == pytest.approx(1)


def test_a_stopped_run_goes_on_to_the_bits_of_a_whole_one(tmp_path: Path, finished_run: Path):
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), redirect_stdout(StopsAfterFirstEpoch(run / "metrics.csv")):
        train(QUICK, run, say=hush)
    assert [row["epoch"] for row in rows_of(run)] == ["1"], "each row is on the disk once its epoch ends"
    assert not (run / "result.json").exists()
    with pytest.raises(RunError, match="has not ended; continue it with --resume"):
        load_run(run)

    train(QUICK, run, resume=True, say=hush)
    for file in ("last.safetensors", "best.safetensors"):
        whole, resumed = tensors_of(finished_run / file), tensors_of(run / file)
        assert list(whole) == list(resumed)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), file
    assert without_times(rows_of(run)) == without_times(rows_of(finished_run))


def test_a_row_that_was_cut_short_is_dropped_when_a_run_goes_on(tmp_path: Path, finished_run: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:3]) + lines[3][:9])  # cut short in the third row
    (run / "result.json").unlink()
    train(QUICK, run, resume=True, say=hush)
    assert [row["epoch"] for row in rows_of(run)] == ["1", "2"]  # what is not known is not made up
    assert [row.epoch for row in read_metrics(run / "metrics.csv")] == [1, 2]


def test_resuming_uses_the_configuration_of_the_run_for_its_data_too(tmp_path: Path):
    run = tmp_path / "run"
    config = replace(QUICK, epochs=2)
    with pytest.raises(KeyboardInterrupt), redirect_stdout(StopsAfterFirstEpoch(run / "metrics.csv")):
        train(config, run, say=hush)
    other = replace(config, seed=5, validation_images=1200, epochs=9, learning_rate=0.7)
    result = train(other, run, resume=True, say=hush)
    assert read_config(run) == config
    assert len(rows_of(run)) == 2
    assert result["seed"] == 0
    assert "1300 for validation by seed 0" in result["split"], "another split would train on validation images"


def test_resuming_nothing_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match="is not a run folder"):
        train(QUICK, tmp_path / "none", resume=True, say=hush)


def test_an_existing_run_is_not_overwritten(tmp_path: Path, finished_run: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(RunError, match=r"already holds a run; give --resume.*--overwrite"):
        train(replace(QUICK, epochs=1), run, say=hush)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_overwriting_replaces_every_file_of_the_old_run(tmp_path: Path, finished_run: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    train(replace(QUICK, epochs=1), run, overwrite=True, say=hush)
    assert [row["epoch"] for row in rows_of(run)] == ["1"]
    assert read_config(run).epochs == 1
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert (run / "notes.txt").read_text() == "mine", "what is not the run's is not touched"


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(UsageError, match="batch_size = 138: there are only 137 training images"):
        train(replace(QUICK, batch_size=138), tmp_path / "run", say=hush)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot be made"):
        train(QUICK, tmp_path / "file" / "run", say=hush)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"epochs": 3}', '{"dataset": "digits", "era": 1}'])
def test_a_damaged_configuration_is_refused_by_path(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"is not a run folder: .*config\.json"):
        read_config(tmp_path)


def test_pixel_statistics_are_those_of_the_training_part_alone():
    dataset = load(QUICK)
    found = pixel_statistics(dataset)
    scaled = dataset.training.images / 255
    # rounded to six digits
    assert found.mean == pytest.approx(scaled.mean((0, 1, 2)), abs=5.1e-7)
    assert found.std == pytest.approx(scaled.std((0, 1, 2)), abs=5.1e-7)
    whole = np.concatenate([scaled, dataset.validation.images / 255, dataset.test.images / 255])
    assert found.mean != pytest.approx(whole.mean((0, 1, 2)), abs=5.1e-7), "the other parts would show"


def test_a_loss_that_is_not_finite_leaves_the_last_good_epoch(tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(RunError, match="not finite"):
        train(TrainConfig("digits", "small_cnn", 3, 16, learning_rate=1e30, validation_images=1300), run, say=hush)
    assert (run / "config.json").exists()
    assert not (run / "result.json").exists()


@pytest.mark.usefixtures("_free_again")
def test_a_deterministic_run_gives_the_same_bits_twice_and_does_not_bind_the_next(tmp_path: Path):
    config = replace(QUICK, epochs=2, deterministic=True, flip=True, cutout=2.0, dropout=0.3)
    for name in ("one", "other"):
        torch.manual_seed(len(name))
        train(config, tmp_path / name, say=hush)
        assert torch.are_deterministic_algorithms_enabled()
    for file in ("last.safetensors", "best.safetensors"):
        one, other = (tensors_of(tmp_path / name / file) for name in ("one", "other"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    train(replace(config, deterministic=False, epochs=1), tmp_path / "free", say=hush)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("is_wanted", [True, False])
def test_cublas_gets_its_workspace_before_torch_is_loaded_where_a_run_is_deterministic(monkeypatch, is_wanted: bool):
    monkeypatch.setattr(os, "environ", {})
    prepare_arithmetic(replace(QUICK, deterministic=is_wanted))
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if is_wanted else None)
