"""Two processes under torchrun, on the CPU: what they compute together equals one process on the joined data."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from training_support import QUICK, hush

from training.checkpoint import load_checkpoint, read_facts
from training.distributed import place, slow
from training.environment import Launched, launched_processes
from training.errors import UsageError
from training.report import read_metrics
from training.run import build_network, load_run, train

WORKER = Path(__file__).parent / "distributed_worker.py"
CONFIG = replace(
    QUICK,
    epochs=1,
    batch_size=68,
    warmup_share=0.0,
    translate=1.0,
    flip=True,
    population_images=136,
    precision="float32",
)


def torchrun(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_process_has_a_gpu_of_its_own_and_processes_that_share_one_talk_through_gloo():
    four = [Launched(rank, rank, 4, 4) for rank in range(4)]
    assert [place(one, 4) for one in four] == [(0, "nccl"), (1, "nccl"), (2, "nccl"), (3, "nccl")]
    assert [place(one, 2) for one in four] == [(0, "gloo"), (1, "gloo"), (0, "gloo"), (1, "gloo")]
    assert place(Launched(9, 1, 8, 16), 8) == (1, "nccl"), "the second machine's second"


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched_processes() is None
    for value, name in enumerate(("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")):
        assert launched_processes() is None
        monkeypatch.setenv(name, str(value))
    assert launched_processes() == Launched(rank=0, local_rank=1, local_world_size=2, world_size=3)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_launcher_that_leaves_out_a_variable_is_refused_by_its_name(monkeypatch, missing: str):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(UsageError, match=f"^WORLD_SIZE = 2, and {missing} not set"):
        launched_processes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched_processes() is None


def test_processes_that_talk_through_gloo_are_told_why_they_are_slow():
    assert "8 processes on this machine see 1 GPU: sums go through gloo" in slow(Launched(0, 0, 8, 8), 1)


def given_batch(folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, momentum=0.3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
        norm.running_mean.fill_(0.25)
    images = torch.randn(10, 3, 4, 4) * 2 + torch.arange(10).view(10, 1, 1, 1)
    given = {"state": norm.state_dict(), "images": images, "weights": torch.randn(10, 3, 4, 4)}
    torch.save(given, folder / "given.pt")
    return given


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("measured")
    given = given_batch(folder)
    torchrun(str(WORKER), "measure", str(folder))
    return given, [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def oracle(measured):
    """Torch's own BatchNorm in float64 over the joined batch."""
    given, _ = measured
    norm = nn.BatchNorm2d(3, momentum=0.3, dtype=torch.float64)
    norm.load_state_dict(given["state"])
    images = given["images"].double().requires_grad_()
    answer = norm.train()(images)
    (answer * given["weights"]).sum().backward()
    return {"answer": answer.detach(), "gradient": images.grad, "norm": norm}


@pytest.mark.e2e
def test_synchronised_statistics_are_those_of_the_joined_batch_unbiased_over_its_count(measured, oracle):
    for found in measured[1]:
        torch.testing.assert_close(found["mean"].double(), oracle["norm"].running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["variance"].double(), oracle["norm"].running_var, rtol=1e-6, atol=1e-6)


@pytest.mark.e2e
def test_answers_and_gradients_are_those_of_the_joined_batch(measured, oracle):
    answer, gradient = (torch.cat([found[key] for found in measured[1]]) for key in ("answer", "gradient"))
    torch.testing.assert_close(answer.double(), oracle["answer"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), oracle["gradient"], rtol=1e-5, atol=1e-6)
    weights = sum(found["weight_gradient"] for found in measured[1])  # each process has its part of the sum
    torch.testing.assert_close(weights.double(), oracle["norm"].weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.e2e
def test_moments_of_unequal_parts_merge_to_the_same_bits_everywhere(measured):
    given, (first, second) = measured
    assert torch.equal(first["merged_variance"], second["merged_variance"])
    images = given["images"].double().numpy()
    joined = np.concatenate([images[0::2][:5], images[1::2][:4]]).transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(first["merged_mean"], joined.mean(1), rtol=1e-13)
    np.testing.assert_allclose(first["merged_variance"], joined.var(1, ddof=1), rtol=1e-13)


@pytest.mark.e2e
def test_statistics_that_were_kept_apart_merge_with_the_spread_between_them(measured):
    given, (first, second) = measured
    halves = [half.double() for half in given["images"].split(5)]
    means = torch.stack([half.mean((0, 2, 3)) for half in halves])
    variances = torch.stack([half.var((0, 2, 3)) for half in halves])
    wanted = variances.mean(0) + means.var(0, correction=0)
    torch.testing.assert_close(first["apart_variance"].double(), wanted, rtol=1e-6, atol=0)
    assert torch.equal(first["apart_variance"], second["apart_variance"])
    assert (wanted > 1.5 * variances.mean(0)).all(), "the average of the variances alone would be far off"


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


@pytest.fixture(scope="module")
def two_and_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The same run by two processes and by one."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "given.json").write_text(CONFIG.to_json())
    said = torchrun(str(WORKER), "train", str(folder))
    train(CONFIG, folder / "alone", say=hush)
    return folder / "run", folder / "alone", said


@pytest.mark.e2e
def test_two_processes_train_as_one_does_at_the_same_global_batch(two_and_one):
    run, alone, _ = two_and_one
    for file in ("last.safetensors", "best.safetensors"):  # raw statistics, and population statistics of all processes
        together, single = (tensors_of(folder / file) for folder in (run, alone))
        assert list(together) == list(single)
        for name in single:
            # two steps of float32 sums in another order; later ones amplify rounding without bound
            torch.testing.assert_close(together[name], single[name], rtol=1e-4, atol=1e-5)
    assert [read_facts(folder / "best.safetensors").statistics for folder in (run, alone)] == ["population"] * 2
    rows = [read_metrics(folder / "metrics.csv") for folder in (run, alone)]
    assert rows[0][0].validation_accuracy == pytest.approx(rows[1][0].validation_accuracy, abs=2 / 1300)
    result = json.loads((run / "result.json").read_text())
    assert result["processes"] == 2


@pytest.mark.e2e
def test_one_process_writes_and_speaks(two_and_one):
    run, alone, said = two_and_one
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert {path.name.split(".tfevents")[0] for path in run.iterdir()} == {
        path.name.split(".tfevents")[0] for path in alone.iterdir()
    }
    first, second = (json.loads((run.parent / f"wrote-{rank}.json").read_text()) for rank in range(2))
    assert {"metrics.csv", ".last.safetensors.part", ".best.safetensors.part", ".result.json.part"} <= set(first)
    assert second == []
    assert said.count("epoch 1/1") == said.count("test accuracy") == 1
    assert re.search(r"batches of 68 over 2 processes, of which BatchNorm sees 68 images at a time", said)


@pytest.mark.e2e
def test_checkpoints_of_two_processes_and_of_one_are_interchangeable(tmp_path: Path, two_and_one):
    run, alone, _ = two_and_one
    trained = load_run(run)
    load_checkpoint(alone / "best.safetensors", build_network(trained.config, trained.dataset))
    longer = replace(CONFIG, epochs=2)
    shutil.copytree(alone, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(longer.to_json())
    (tmp_path / "given.json").write_text(longer.to_json())
    torchrun(str(WORKER), "train", str(tmp_path))
    again = shutil.copytree(run, tmp_path / "again")
    (again / "config.json").write_text(longer.to_json())
    train(CONFIG, again, resume=True, say=hush)
    ends = [read_metrics(folder / "metrics.csv") for folder in (tmp_path / "run", again)]
    assert [[row.epoch for row in rows] for rows in ends] == [[1, 2], [1, 2]]
    # one process then two, and two then one, take the same four steps: float32 rounding, amplified by each
    assert ends[0][1].train_loss == pytest.approx(ends[1][1].train_loss, rel=1e-3)
    for name, value in tensors_of(tmp_path / "run" / "last.safetensors").items():
        torch.testing.assert_close(value, tensors_of(again / "last.safetensors")[name], rtol=1e-2, atol=1e-3)
