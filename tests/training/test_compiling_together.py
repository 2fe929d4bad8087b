"""`compile` under torchrun, on the CPU: compiled processes train as one that is not, and all compile or none does."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from training_support import QUICK, hush

from training import compiling
from training.architectures import build
from training.batches import Batch
from training.config import TrainConfig
from training.learner import Learner
from training.loop import Normalize
from training.normalization.domains import separate
from training.optimization import build_optimizer
from training.run import train

WORKER = Path(__file__).parent / "distributed_worker.py"
PLAIN = replace(
    QUICK, epochs=1, batch_size=68, accumulate=2, warmup_share=0.0, population_images=136, precision="float32"
)
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
]


def together(folder: Path, configs: dict[str, TrainConfig], lame: int | None = None) -> tuple[str, str, list[dict]]:
    """Train by each configuration in two processes; return what they said and complained of, and exit codes."""
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(config.to_json())
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), "compile"]
    command = [sys.executable, *run, str(folder), str(lame)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, [json.loads((folder / f"codes-{rank}").read_text()) for rank in range(2)]


def result_of(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def assert_close(run: Path, other: Path) -> None:
    """Two steps of float32 sums in another order; later ones amplify rounding without bound."""
    mine, theirs = (load_file(folder / "last.safetensors") for folder in (run, other))
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    train(PLAIN, run, say=hush)
    return run


def test_two_compiled_processes_train_as_one_that_is_not(tmp_path: Path, alone: Path, domain_data: Path):
    (tmp_path / "negative").symlink_to(domain_data / "negative")
    apart = {"dataset": "digits+folder:negative", "domains": "separate", "limit_images": 137, "workers": 0}
    compiled = replace(PLAIN, compile="on")
    frozen = replace(compiled, sync_bn=False, freeze_statistics_from=2, epochs=2)
    configs = {"domains": replace(compiled, **apart), "frozen": frozen, "plain": compiled}
    said, _, codes = together(tmp_path, configs)
    assert codes == [dict.fromkeys(configs, 0)] * 2
    assert said.count("compiled and warmed up in") == len(configs)
    assert all(result_of(tmp_path / name)["compiled"] for name in configs)
    assert result_of(tmp_path / "plain")["processes"] == 2
    assert_close(tmp_path / "plain", alone)


def test_where_one_process_cannot_compile_none_does_and_the_reason_is_told(tmp_path: Path, alone: Path):
    configs = {asked: replace(PLAIN, compile=asked) for asked in ("auto", "on")}
    said, complained, codes = together(tmp_path, configs, lame=1)
    assert codes == [{"auto": 0, "on": 1}] * 2
    line = "compile = auto: torch could not compile the step here (rank 1 of 2: No working C++ compiler found"
    assert said.count(line) == said.count("warmed up in") == 1
    assert not result_of(tmp_path / "auto")["compiled"]
    assert_close(tmp_path / "auto", alone)
    assert "compile = on: torch could not compile the step here (rank 1 of 2: No working C++ compiler" in complained
    assert not (tmp_path / "on").exists()


@pytest.fixture
def _one_that_joined(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_that_joined")
def test_a_process_that_torchrun_started_alone_steps_by_domain_after_its_trial(monkeypatch):
    """What a pass of one domain alone leaves in torch's reducer is no gradient that the first step has to have."""
    monkeypatch.setattr(compiling, "compiled", lambda run: run)
    config = replace(PLAIN, compile="on", domains="separate", accumulate=1)
    network = separate(build("small_cnn", channels=1, classes=10, size=8, bn_momentum=0.1), ("a", "b"))
    model = nn.Sequential(Normalize((0.5,), (0.25,)), network).to(torch.float32)
    one = Learner(model, build_optimizer(config, model), config, domains=("a", "b"))
    batch = Batch(torch.randint(0, 256, (16, 1, 8, 8)).float(), torch.arange(16) % 10, 0)
    assert one.warm_up(batch) is None
    assert one.step([batch], 1).images == 16
