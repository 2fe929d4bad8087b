"""Runs that stop and go on: after any step, by Ctrl-C, by SIGKILL, with other threads, early; and what `last` holds."""

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from training_support import QUICK, disk_of, hush

from training.checkpoint import load_checkpoint, read_facts
from training.config import TrainConfig
from training.errors import RunError
from training.fitting import estimate_on
from training.loop import Batches, Normalize
from training.normalization import batch_norms
from training.report import read_metrics, recorder
from training.run import Trained, build_network, load_run, train

CONFIG = replace(
    QUICK, epochs=5, validation_images=200, flip=True, cutout=2.0, save_steps=3, population_images=300, weight_ema=0.0
)
IS_FAST = {"epochs": 5, "validation_images": 1300}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def rows_of(run: Path) -> list[tuple[float, ...]]:
    rows = read_metrics(run / "metrics.csv")
    return [(row.epoch, row.train_loss, row.train_accuracy, row.validation_loss, row.learning_rate) for row in rows]


def assert_same(run: Path, whole: Path) -> None:
    for name in ("last.safetensors", "best.safetensors"):
        mine, theirs = tensors_of(run / name), tensors_of(whole / name)
        assert list(mine) == list(theirs)
        different = [key for key in mine if not torch.equal(mine[key], theirs[key])]
        assert not different, (name, different)
    assert rows_of(run) == rows_of(whole)


@pytest.fixture(scope="module")
def configs() -> dict[str, TrainConfig]:
    plain = replace(CONFIG, **IS_FAST)
    return {
        "plain": plain,
        "averaged, accumulated, clipped": replace(plain, weight_ema=0.9, accumulate=2, clip_norm=1.0, epochs=2),
        "float16": replace(plain, precision="float16", epochs=2),
        "frozen": replace(plain, freeze_statistics_from=2, epochs=3),
    }


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory, configs) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("wholes")
    for index, config in enumerate(configs.values()):
        train(config, base / str(index), say=hush)
    return {name: base / str(index) for index, name in enumerate(configs)}


@pytest.mark.parametrize("name", ["plain", "averaged, accumulated, clipped", "float16", "frozen"])
@pytest.mark.parametrize("steps", [3, 13], ids=["in the first epoch", "in the second"])
def test_a_run_stopped_in_an_epoch_goes_on_to_the_bits_of_a_whole_one(
    tmp_path: Path, monkeypatch, configs, wholes, name: str, steps: int
):
    from training import fitting

    run, seen = tmp_path / "run", []
    original = fitting.Fit._after_step

    def stop(self, epoch, tally, seconds):
        seen.append(1)
        if len(seen) == steps:
            os.kill(os.getpid(), signal.SIGINT)  # a real Ctrl-C, at a known step
        original(self, epoch, tally, seconds)

    monkeypatch.setattr(fitting.Fit, "_after_step", stop)
    with pytest.raises(
        RunError, match=r"stopped in epoch \d after (\d+ steps|1 step), nothing is lost; go on with --resume"
    ):
        train(configs[name], run, say=hush)
    monkeypatch.undo()
    assert read_facts(run / "last.safetensors").step > 0
    torch.manual_seed(99)
    train(configs[name], run, resume=True, say=hush)
    assert_same(run, wholes[name])


def test_two_epochs_and_three_are_five(tmp_path: Path, monkeypatch, configs, wholes):
    from training import fitting

    run = tmp_path / "run"
    original = fitting.Fit._epoch

    def stop(self, epoch, records, display):
        if epoch == 3:
            raise KeyboardInterrupt
        original(self, epoch, records, display)

    monkeypatch.setattr(fitting.Fit, "_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(configs["plain"], run, say=hush)
    monkeypatch.undo()
    assert [row[0] for row in rows_of(run)] == [1, 2]
    train(configs["plain"], run, resume=True, say=hush)
    assert_same(run, wholes["plain"])


@pytest.mark.parametrize("batch_size", [137, 16], ids=["of one step an epoch", "in validation"])
def test_ctrl_c_ends_a_run_after_an_epoch_of_which_no_step_is_left(tmp_path: Path, monkeypatch, batch_size: int):
    from training import fitting

    run, original = tmp_path / "run", fitting.Fit._validate

    def stop(self):
        if self.facts.epoch == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(fitting.Fit, "_validate", stop)
    config = replace(CONFIG, **IS_FAST, batch_size=batch_size, save_steps=0)
    with pytest.raises(RunError, match="stopped after epoch 1, which is kept; go on with --resume"):
        train(config, run, say=hush)
    monkeypatch.undo()
    assert read_facts(run / "last.safetensors").epoch == 1
    train(config, run, resume=True, say=hush)
    assert [row[0] for row in rows_of(run)] == [1, 2, 3, 4, 5]


@pytest.mark.e2e
def test_a_run_killed_again_and_again_ends_with_the_bits_of_a_whole_one(tmp_path: Path):
    config = replace(CONFIG, validation_images=1300, epochs=2, threads=1, save_steps=1)
    code = (
        "import json, sys; from pathlib import Path; from training.config import TrainConfig;"
        "from training.run import train; import torch; torch.set_num_threads(1);"
        "c = TrainConfig.from_mapping(json.loads(sys.argv[1])); r = Path(sys.argv[2]);"
        "train(c, r, resume=(r / 'config.json').exists())"
    )

    def start(run: Path) -> subprocess.Popen:
        arguments = [sys.executable, "-c", code, config.to_json(), str(run)]
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL)

    whole, run = tmp_path / "whole", tmp_path / "run"
    together = start(whole), start(run)
    kill_behind(together[1], run, 3)
    kill_behind(start(run), run, 10)
    assert together[0].wait(120) == 0
    assert start(run).wait(120) == 0
    assert_same(run, whole)
    assert not [path for path in run.iterdir() if path.name.endswith(".part")], "no half-written file is left"


def kill_behind(process: subprocess.Popen, run: Path, steps: int) -> None:
    """Kill a run somewhere behind its checkpoint of `steps` steps; a checkpoint is written at every step."""
    while progress(run) < steps:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
            break
    process.send_signal(signal.SIGKILL)
    process.wait(60)


def progress(run: Path) -> int:
    """Return how many steps `last` holds, by its facts."""
    try:
        facts = read_facts(run / "last.safetensors")
    except RunError:
        return 0
    return facts.epoch * 8 + facts.step


def test_last_holds_raw_statistics_and_best_says_what_it_holds(tmp_path: Path):
    run = tmp_path / "run"
    result = train(replace(CONFIG, **IS_FAST, bn_momentum=0.02), run, say=hush)
    last, best = (read_facts(run / f"{name}.safetensors") for name in ("last", "best"))
    assert last.statistics == "raw"
    assert (best.statistics, result["statistics"]) == ("population", "population")
    assert set(result["statistics_compared"]) == {"corrected", "population"}
    assert result["validation_accuracy"] == max(result["statistics_compared"].values())
    counts = [value for name, value in tensors_of(run / "last.safetensors").items() if name.endswith("batches_tracked")]
    share = 0.98 ** int(counts[0])
    assert share > 0.3, "raw statistics still hold much of their start, so that this test can see them"
    raw = tensors_of(run / "last.safetensors")["block1.norm.running_var"]
    assert (raw > share * 0.999).all(), "the variance of 1 that they started from is in them"


def test_corrected_statistics_are_kept_where_the_network_was_trained_with_them_and_fits_no_others(tmp_path: Path):
    run, told = tmp_path / "run", []
    frozen = replace(QUICK, epochs=6, clip_norm=1.0, learning_rate=0.02, freeze_statistics_from=2)
    result = train(frozen, run, say=told.append)
    compared = result["statistics_compared"]
    assert compared["population"] < compared["corrected"] == result["validation_accuracy"]
    assert read_facts(run / "best.safetensors").statistics == result["statistics"] == "corrected"
    assert any(line.startswith("BatchNorm statistics: corrected kept; validation") for line in told)
    rows = read_metrics(run / "metrics.csv")
    assert compared["corrected"] == max(row.validation_accuracy for row in rows), "those of the best epoch, unspoiled"


def test_averaged_weights_are_kept_with_statistics_estimated_for_them(tmp_path: Path):
    run = tmp_path / "run"
    result = train(replace(CONFIG, epochs=3, validation_images=1300, weight_ema=0.9, bn_momentum=0.02), run, say=hush)
    best, last = (tensors_of(run / f"{name}.safetensors") for name in ("best", "last"))
    assert (result["best_epoch"], result["statistics"]) == (3, "population")
    weights = [name for name in best if name.endswith("conv.weight")]
    assert weights
    for name in weights:
        assert torch.equal(best[name], last[f"average.module.{name}"])
        assert not torch.equal(best[name], last[name])
    again = copy.deepcopy(load_run(run))
    model = torch.nn.Sequential(Normalize(again.pixels.mean, again.pixels.std), again.network).float()
    estimate_on(model, Batches.on(torch.device("cpu"), again.dataset.training), again.config)
    for name, norm in batch_norms(again.network):
        torch.testing.assert_close(best[f"{name}.running_var"], norm.running_var, rtol=1e-6, atol=0)
        live = last[f"{name}.running_var"]
        assert not torch.allclose(live, norm.running_var, rtol=0.05), "those of the live weights belong to others"


def test_frozen_statistics_stay_from_their_epoch_on(tmp_path: Path):
    runs = {}
    for epochs in (2, 4):
        config = replace(CONFIG, epochs=epochs, validation_images=1300, freeze_statistics_from=3, schedule="constant")
        train(config, tmp_path / str(epochs), say=hush)
        runs[epochs] = tensors_of(tmp_path / str(epochs) / "last.safetensors")
    before, after = runs[2], runs[4]
    for name in (name for name in before if "running_" in name or "tracked" in name):
        assert torch.equal(before[name], after[name]), name
    gammas = [name for name in before if name.endswith("norm.weight") and not name.startswith("optimizer")]
    assert gammas
    assert not any(torch.equal(before[name], after[name]) for name in gammas), "γ still trains"


def test_choosing_statistics_a_second_time_changes_nothing(tmp_path: Path, wholes):
    run = shutil.copytree(wholes["plain"], tmp_path / "run")
    before = (run / "best.safetensors").read_bytes()
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    again = train(QUICK, run, resume=True, say=hush)
    assert (run / "best.safetensors").read_bytes() == before
    assert again["statistics_compared"] == result["statistics_compared"]


def test_the_running_statistics_stay_where_population_statistics_are_switched_off(tmp_path: Path):
    result = train(
        replace(CONFIG, **IS_FAST, population_images=0, bn_bias_correction=False), tmp_path / "run", say=hush
    )
    assert result["statistics"] == "raw"
    assert result["statistics_compared"] == {}


def test_a_run_goes_on_with_the_threads_it_had_and_says_so(tmp_path: Path, wholes):
    run = shutil.copytree(wholes["plain"], tmp_path / "run")
    told: list[str] = []
    torch.set_num_threads(2)
    try:
        train(QUICK, run, resume=True, say=told.append)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert told[0] == "1 CPU thread, as the run had; here it would be 2"


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path):
    told: list[str] = []
    config = replace(CONFIG, epochs=30, validation_images=1300, learning_rate=1e-9, warmup_share=0.0, patience=2)
    train(replace(config, bn_momentum=1.0), tmp_path / "run", say=told.append)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    best = read_facts(tmp_path / "run" / "last.safetensors").best_epoch
    assert len(rows) == best + 2 < 30
    assert any(f"stopped after epoch {len(rows)}: no better since epoch {best}" in line for line in told)


def test_a_full_disk_in_the_middle_of_a_run_is_one_line_and_leaves_the_last_checkpoint(tmp_path: Path, finished_run):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "result.json").unlink()
    with disk_of(3000), pytest.raises(RunError, match=r"(best|metrics|result).*cannot be written"):
        train(replace(QUICK, epochs=4), run, overwrite=True, say=hush)
    assert not list(run.glob(".*.part"))


def test_a_row_that_finds_no_room_is_refused_with_the_mend(tmp_path: Path, trained: Trained, finished_run: Path):
    row = read_metrics(finished_run / "metrics.csv")[0]
    with recorder(tmp_path, 0) as records:
        size = (tmp_path / "metrics.csv").stat().st_size
        with disk_of(size), pytest.raises(RunError, match=r"metrics\.csv cannot be written.*--resume"):
            records.epoch(row, trained.network)


def test_population_statistics_reach_the_exported_network(finished_run: Path, trained: Trained):
    network = build_network(trained.config, trained.dataset)
    facts, _ = load_checkpoint(finished_run / "best.safetensors", network)
    assert facts.statistics == trained.statistics
    for (_, mine), (_, theirs) in zip(batch_norms(network), batch_norms(trained.network), strict=True):
        assert torch.equal(mine.running_var, theirs.running_var)
