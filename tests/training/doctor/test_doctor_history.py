"""What a checkpoint tells beside its numbers: steps, frozen γ and β, averages of weights."""

import copy
from pathlib import Path

import pytest
import torch
from foreign_support import network
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.doctor.examine import inspect
from training.normalization.domains import separate


def found(path: Path) -> dict[str, tuple[str, ...]]:
    """Return where each check found something."""
    report = inspect(path, 0.1)
    assert all(finding.severity == "warning" for finding in report.findings if finding.check != "never-updated")
    return {finding.check: finding.where for finding in report.findings}


def saved(folder: Path, content: dict) -> Path:
    torch.save(content, folder / "network.pt")
    return folder / "network.pt"


def test_a_network_that_trained_as_usual_has_no_finding(tmp_path: Path):
    state = network().state_dict()
    optimizer = {"state": {0: {"step": torch.tensor(1050.0)}}, "param_groups": []}
    assert found(saved(tmp_path, {"state_dict": state, "optimizer": optimizer, "epoch": 3})) == {}


@pytest.mark.parametrize(
    "around",
    [
        {"global_step": 5000},
        {"optimizer": {"state": {0: {"step": 5000}}}},
        {"optimizer_state_dict": {"state": {0: {"step": torch.tensor(5000.0)}}}},
    ],
    ids=["global_step", "Adam's own count", "as a tensor"],
)
def test_counters_far_below_the_steps_of_the_optimizer_are_named(tmp_path: Path, around: dict):
    path = saved(tmp_path, {"state_dict": network().state_dict(), **around})
    assert set(found(path)) == {"counters-behind-steps"}


def test_the_counters_of_all_domains_together_are_held_against_the_steps(tmp_path: Path):
    state = separate(network(), ("day", "night")).state_dict()  # 1000 batches each
    assert found(saved(tmp_path, {"state_dict": state, "global_step": 2000})) == {}
    assert set(found(saved(tmp_path, {"state_dict": state, "global_step": 5000}))) == {"counters-behind-steps"}


def test_more_batches_than_steps_are_gradients_that_were_accumulated(tmp_path: Path):
    assert found(saved(tmp_path, {"state_dict": network().state_dict(), "global_step": 250})) == {}


def test_gamma_and_beta_that_never_moved_while_the_statistics_did_are_named(tmp_path: Path):
    model = network()
    with torch.no_grad():
        model.bn2.weight.fill_(1)
        model.bn2.bias.fill_(0)
    assert found(saved(tmp_path, model.state_dict())) == {"frozen-affine": ("bn2",)}


def test_gamma_and_beta_that_the_file_marks_as_not_trained_are_named(tmp_path: Path):
    model = network()
    model.bn1.requires_grad_(requires_grad=False)
    assert found(saved(tmp_path, model.state_dict(keep_vars=True))) == {"frozen-affine": ("bn1",)}


def averaged(*, use_buffers: bool) -> tuple[torch.nn.Module, AveragedModel]:
    """Train a little, for an average that lags behind."""
    live = network().train()
    average = AveragedModel(live, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(live.parameters(), 0.05)
    for seed in range(4):
        images = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
        live(images).square().mean().backward()
        optimizer.step()
        average.update_parameters(live)
    return live, average


def test_averaged_weights_with_the_live_networks_statistics_are_named(tmp_path: Path):
    live, average = averaged(use_buffers=False)
    path = saved(tmp_path, {"model": live.state_dict(), "model_ema": average.state_dict()})
    assert found(path) == {"averaged-weights": ("bn1", "bn2")}


def test_an_average_with_statistics_of_its_own_is_healthy(tmp_path: Path):
    live, average = averaged(use_buffers=True)
    assert found(saved(tmp_path, {"model": live.state_dict(), "model_ema": average.state_dict()})) == {}


def test_an_average_whose_statistics_still_are_the_initial_ones_was_never_updated(tmp_path: Path):
    live, _ = averaged(use_buffers=True)
    fresh = copy.deepcopy(live)
    for norm in (fresh.bn1, fresh.bn2):
        norm.reset_running_stats()
    path = saved(tmp_path, {"state_dict": live.state_dict(), "state_dict_ema": fresh.state_dict()})
    assert found(path) == {"never-updated": ("bn1", "bn2")}
    assert [finding.check for finding in inspect(path, 0.1).errors] == ["never-updated"]


def test_an_average_that_stands_alone_is_named(tmp_path: Path):
    _, average = averaged(use_buffers=False)
    assert "averaged-weights" in found(saved(tmp_path, average.state_dict()))


def test_an_average_beside_the_weights_of_a_safetensors_file_is_no_layer_of_its_own(tmp_path: Path):
    live, average = averaged(use_buffers=True)
    tensors = live.state_dict() | {f"average.{name}": value for name, value in average.state_dict().items()}
    tensors["optimizer.0.step"] = torch.tensor(9000.0)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "last.safetensors")
    report = inspect(tmp_path / "last.safetensors", 0.1)
    assert report.layers == 2
    assert [finding.check for finding in report.findings] == ["counters-behind-steps"]
