"""`training.doctor` on checkpoints: each check finds the broken thing, and lets the healthy one be."""

from pathlib import Path

import pytest
import torch
from foreign_support import network
from safetensors.torch import save_file

from training.doctor.examine import inspect


def found(path: Path, momentum: float | None = 0.1) -> dict[str, str]:
    """Return severity by check."""
    return {finding.check: finding.severity for finding in inspect(path, momentum).findings}


def written(folder: Path, state: dict[str, torch.Tensor], suffix: str = ".safetensors") -> Path:
    path = folder / f"network{suffix}"
    if suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network().state_dict().items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_healthy_checkpoint_has_no_finding(tmp_path: Path, state, suffix: str):
    report = inspect(written(tmp_path, state, suffix), 0.1)
    assert (report.layers, report.findings) == (2, ())


def _never_updated(state):
    state["bn1.num_batches_tracked"].zero_()
    state["bn2.num_batches_tracked"].zero_()


def _initial(state):
    state["bn1.running_mean"].zero_()
    state["bn1.running_var"].fill_(1)


def _cold(state):
    for name in ("bn1", "bn2"):
        state[f"{name}.num_batches_tracked"].fill_(21)  # 0.9^21 = 10.9 %


def _cool(state):
    for name in ("bn1", "bn2"):
        state[f"{name}.num_batches_tracked"].fill_(22)  # 0.9^22 = 9.8 %


BREAKAGES = {
    "statistics-missing": ("error", lambda state: state.pop("bn1.running_var")),
    "never-updated": ("error", _never_updated),
    "initial-statistics": ("error", _cold),
    "under-warmed": ("warning", _cool),
    "not-finite": ("error", lambda state: state["bn2.running_mean"].view(-1)[3:4].fill_(torch.nan)),
    "negative-variance": ("error", lambda state: state["bn2.running_var"][3:4].fill_(-1e-3)),
    "counters-disagree": ("warning", lambda state: state["bn2.num_batches_tracked"].fill_(2000)),
    "counter-missing": ("warning", lambda state: state.pop("bn2.num_batches_tracked")),
    "tiny-variance": ("warning", lambda state: state["bn2.running_var"][3:4].fill_(1e-9)),
    "offset-heavy": ("warning", lambda state: state["bn2.running_mean"][3:4].fill_(5000)),
    "dead-channels": ("warning", lambda state: state["bn2.weight"][3:4].fill_(0)),
    "negative-gamma": ("warning", lambda state: state["bn2.weight"][3:4].fill_(-1)),
}


@pytest.mark.parametrize("check", BREAKAGES)
def test_each_check_finds_the_broken_thing_and_nothing_else(tmp_path: Path, state, check: str):
    severity, damage = BREAKAGES[check]
    damage(state)
    assert found(written(tmp_path, state)) == {check: severity}


def test_mean_0_and_variance_1_exactly_were_never_updated_whatever_the_counter_says(tmp_path: Path, state):
    _initial(state)
    assert found(written(tmp_path, state)) == {"never-updated": "error"}


def test_a_checkpoint_of_trainable_parameters_alone_lacks_its_statistics(tmp_path: Path, state):
    parameters = {name: state[name] for name in state if "running" not in name and "tracked" not in name}
    report = inspect(written(tmp_path, parameters), 0.1)
    assert [(finding.check, finding.where) for finding in report.errors] == [("statistics-missing", ("bn1", "bn2"))]


def test_a_layer_norm_behind_a_convolution_with_bias_is_not_taken_for_a_batch_norm(tmp_path: Path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.LayerNorm(8))
    assert found(written(tmp_path, model.state_dict())) == {}


@pytest.mark.parametrize(("momentum", "checks"), [(0.9, {"momentum"}), (0.5, set()), (0.02, set())])
def test_a_momentum_of_tensorflows_convention_is_named(tmp_path: Path, state, momentum: float, checks: set[str]):
    assert set(found(written(tmp_path, state), momentum)) == checks


def _warmed(state, momentum: float, updates: int):
    """Leave in the statistics what that many updates at that momentum leave."""
    share = (1 - momentum) ** updates
    for name in ("bn1", "bn2"):
        state[f"{name}.running_mean"].mul_(1 - share)
        state[f"{name}.running_var"].mul_(1 - share).add_(share)
        state[f"{name}.num_batches_tracked"].fill_(updates)


def test_without_a_momentum_the_numbers_tell_whether_much_of_the_start_is_left(tmp_path: Path, state):
    _warmed(state, 0.001, 300)  # 74 % left
    report = inspect(written(tmp_path, state))
    assert [finding.check for finding in report.errors] == ["initial-statistics"]
    assert "0.001" in report.errors[0].observed
    for share in ("at 0.1", "at 0.01", "0.74 at 0.001"):
        assert share in report.notes[0]


def test_without_a_momentum_statistics_that_no_cold_start_explains_are_healthy(tmp_path: Path, state):
    """The same count of batches, but variances of 0.1: at most a tenth of them can be the start's."""
    for name in ("bn1", "bn2"):
        state[f"{name}.num_batches_tracked"].fill_(300)
        state[f"{name}.running_var"][0] = 0.05
    assert found(written(tmp_path, state), None) == {}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_names_are_taken_off(tmp_path: Path, state, prefix: str):
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    path = written(tmp_path, {"epoch": 3, "state_dict": wrapped, "optimizer": {}}, ".pt")
    report = inspect(path, 0.1)
    assert (report.layers, report.findings) == (2, ())


def test_weights_that_are_not_finite_are_found_outside_batchnorm_too(tmp_path: Path, state):
    state["conv2.weight"][0, 0, 0, 0] = torch.nan
    report = inspect(written(tmp_path, state), 0.1)
    assert [(finding.check, finding.where) for finding in report.findings] == [("not-finite", ("conv2.weight",))]


def test_a_run_folder_brings_its_momentum(finished_run: Path):
    report = inspect(finished_run)
    assert report.kind == "run folder"
    assert report.layers > 0
    assert report.errors == ()
    assert not [note for note in report.notes if "momentum" in note]
