"""`training.compiling`: a compiled run equals one that is not; without a compiler it says so, or goes on without."""

import copy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from training_support import QUICK, hush

from training import compiling
from training.architectures import build
from training.batches import Batch
from training.errors import Diverged, RunError
from training.export import export
from training.learner import Learner
from training.loop import Normalize, arithmetic
from training.normalization.running import freeze_statistics
from training.optimization import build_optimizer
from training.run import load_run, train

CONFIG = replace(QUICK, epochs=2, precision="float32", population_images=137)
# of torch's own modules, which torch.compile loads
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
NO_COMPILER = """
import sys
from dataclasses import replace
from pathlib import Path
from training_support import QUICK
from training.run import train

for asked in ("on", "auto"):
    run = Path(sys.argv[1]) / asked
    try:
        train(replace(QUICK, epochs=1, population_images=0, compile=asked), run)
        print(asked, "trained")
    except Exception as error:
        print(type(error).__name__, error, run.exists())
"""


@pytest.fixture(scope="session")
def _compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and g++ is not here")


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last.safetensors")


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("eager") / "run"
    train(CONFIG, run, say=hush)
    return run


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, _compiler) -> tuple[Path, dict, list[str]]:
    run, said = tmp_path_factory.mktemp("compiled") / "run", []
    result = train(replace(CONFIG, compile="on"), run, say=said.append)
    return run, result, said


def assert_close(run: Path, other: Path) -> None:
    """16 steps of float32 sums in another order: measured 2e-6 of a tensor's largest value, each step adding to it."""
    mine, theirs = tensors_of(run), tensors_of(other)
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=2e-5 * max(1.0, float(value.abs().max())))


def test_a_compiled_run_equals_one_that_is_not_in_weights_statistics_and_names(eager, compiled):
    run, result, said = compiled
    assert result["compiled"]
    assert result["warm_up_seconds"] > 0
    assert any("compiled and warmed up in" in line for line in said)
    assert_close(run, eager)


def test_a_compiled_run_exports_like_any_other(tmp_path: Path, compiled):
    trained = load_run(compiled[0])
    assert trained.facts.compared.keys() == {"corrected", "population"}
    assert export(trained, tmp_path, "digits").folder.is_dir()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("first", ["on", "off"])
def test_a_run_goes_on_compiled_where_it_was_not_and_back(tmp_path: Path, monkeypatch, eager, first: str):
    from training import fitting

    run, original = tmp_path / "run", fitting.Fit._epoch

    def stop(self, epoch, records, display):
        if epoch == 2:
            raise KeyboardInterrupt
        original(self, epoch, records, display)

    monkeypatch.setattr(fitting.Fit, "_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(replace(CONFIG, compile=first), run, say=hush)
    monkeypatch.undo()
    second = replace(CONFIG, compile="off" if first == "on" else "on")
    (run / "config.json").write_text(second.to_json())
    assert train(second, run, resume=True, say=hush)["compiled"] == (first == "off")
    assert_close(run, eager)


def test_a_compiled_run_stopped_and_resumed_equals_a_whole_one_bit_for_bit(tmp_path: Path, monkeypatch, compiled):
    from training import fitting

    run, original = tmp_path / "run", fitting.Fit._after_step

    def stop(self, epoch, tally, seconds):
        self.is_stopping = epoch == 1 and tally.step == 3
        original(self, epoch, tally, seconds)

    monkeypatch.setattr(fitting.Fit, "_after_step", stop)
    config = replace(CONFIG, compile="on")
    with pytest.raises(RunError, match="after 3 steps"):
        train(config, run, say=hush)
    monkeypatch.undo()
    train(config, run, resume=True, say=hush)
    whole = tensors_of(compiled[0])
    assert all(torch.equal(value, whole[name]) for name, value in tensors_of(run).items())


def learner(config) -> Learner:
    torch.manual_seed(0)
    network = build("small_cnn", channels=1, classes=10, size=8, bn_momentum=0.1)
    model = nn.Sequential(Normalize((0.5,), (0.25,)), network).to(torch.float32, memory_format=torch.channels_last)
    return Learner(model, build_optimizer(config, model), config, arithmetic=arithmetic(config, torch.device("cpu")))


def batch(fill: float = 0.0) -> Batch:
    images = torch.randint(0, 256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    images[3, 0, 2, 2] += fill
    return Batch(images, torch.arange(16) % 10, -1)


@pytest.mark.usefixtures("_compiler")
def test_warming_up_changes_nothing_and_the_guard_holds_for_a_compiled_step():
    one = learner(replace(CONFIG, compile="on", weight_ema=0.9, accumulate=2))
    before = copy.deepcopy(one.model.state_dict())
    assert one.warm_up(batch()) is None
    assert one.is_compiled
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
    assert all(parameter.grad is None for parameter in one.model.parameters())
    one.step([batch(), batch()], 1)
    learned = copy.deepcopy(one.model.state_dict())
    assert not torch.equal(learned["1.block1.norm.running_mean"], before["1.block1.norm.running_mean"])
    with pytest.raises(Diverged):
        one.step([batch(), batch(fill=torch.inf)], 1)
    assert not any(value.isnan().any() for value in one.model.state_dict().values())
    assert list(one.average.module.state_dict()) == list(one.network.state_dict())


@pytest.mark.usefixtures("_compiler")
def test_nothing_is_left_to_compile_in_the_epoch_where_statistics_freeze():
    one = learner(replace(CONFIG, compile="on", freeze_statistics_from=2))
    one.warm_up(batch())
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    one.step([batch()], 1)
    freeze_statistics(one.network)
    one.step([batch()], 2)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.e2e
def test_without_a_compiler_on_ends_with_the_mend_and_auto_on_a_cpu_never_asks_for_one(tmp_path: Path):
    environment = {"PATH": "/nowhere", "CXX": "/nowhere/g++", "PYTHONPATH": "tests:.", "HOME": str(tmp_path)}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "FOLDSERVE_STATE": str(tmp_path)}
    command = [sys.executable, "-c", NO_COMPILER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "RunError compile = on: torch could not compile the step here (No working C++ compiler found" in done.stdout
    assert "or set compile = off False" in done.stdout
    assert "auto trained" in done.stdout


def test_auto_goes_on_uncompiled_where_torch_cannot_compile_and_says_why(monkeypatch):
    def broken(_):
        raise RuntimeError("Python 4.0+ not yet supported for torch.compile")

    monkeypatch.setattr(compiling, "compiled", broken)
    monkeypatch.setattr(compiling, "is_wanted", lambda *_: True)  # as on CUDA
    one = learner(replace(CONFIG, compile="auto"))
    assert one.warm_up(batch()) == "Python 4.0+ not yet supported for torch.compile"
    assert not one.is_compiled
    assert one.step([batch()], 1).images == 16
    with pytest.raises(RunError, match=r"compile = on: .*Python 4\.0.*or set compile = off"):
        learner(replace(CONFIG, compile="on")).warm_up(batch())
