"""`training.optimization`: optimizers, penalties and schedules against torch's own and TensorFlow's formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from training_support import QUICK, train_epoch

from training.config import TrainConfig
from training.errors import UsageError
from training.optimization import build_optimizer, build_schedule, learning_rate, penalty


def config(**values: object) -> TrainConfig:
    """Return a configuration with some keys changed."""
    return QUICK.with_values(values)


def network() -> nn.Module:
    """Two layers with BatchNorm and biases between them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, targets: torch.Tensor) -> None:
    """Take one step on a fixed batch."""
    images = torch.arange(20.0).reshape(5, 4).sin()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), targets).backward()
    optimizer.step()


TARGETS = torch.tensor([0, 1, 0, 1, 1])


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adagrad"])
def test_decay_touches_weights_and_never_gamma_beta_and_biases(kind: str):
    """Where every gradient is zero, only decay can move a parameter."""
    model = network()
    chosen = config(optimizer=kind, weight_decay=0.1, decoupled=True, learning_rate=0.5, momentum=0.0)
    optimizer = build_optimizer(chosen, model)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    for one in model.parameters():
        one.grad = torch.zeros_like(one)
    if kind == "adagrad":  # 0 / √0, were its accumulator left at torch's 0 without an epsilon
        assert optimizer.param_groups[0]["eps"] > 0
    optimizer.step()
    for name, one in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if one.ndim > 1 else 1
        torch.testing.assert_close(one.detach(), before[name] * factor)


def test_sgd_is_torchs_with_nesterov():
    ours, theirs = network(), network()
    optimizer = build_optimizer(config(weight_decay=0.0, learning_rate=0.1), ours)
    oracle = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(3):
        step(ours, optimizer, TARGETS)
        step(theirs, oracle, TARGETS)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_adagrad_is_tensorflows_with_its_accumulator_started():
    """tf.train.AdagradOptimizer: accumulator ← accumulator + g², weight ← weight − rate · g / √accumulator."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    holder = nn.ParameterList([weight])
    chosen = config(optimizer="adagrad", accumulator=0.1, learning_rate=0.1, weight_decay=0.0)
    optimizer = build_optimizer(chosen, holder)
    expected, accumulator = weight.detach().double().numpy().copy(), np.full((2, 2), 0.1)
    for number in range(1, 6):
        gradient = np.array([[0.3, -0.01], [2.0, 0.0]]) * number
        weight.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        accumulator += gradient**2
        expected -= 0.1 * gradient / np.sqrt(accumulator)
    # a float32 step rounds three times, at 2⁻²⁴ each, over five steps of values under 4
    np.testing.assert_allclose(weight.detach().numpy(), expected, atol=5 * 3 * 4 * 2**-24)


def test_adamw_takes_momentum_for_its_first_beta():
    optimizer = build_optimizer(config(optimizer="adamw", momentum=0.8, beta2=0.95), network())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)


def test_l2_as_a_penalty_is_sgds_coupled_decay():
    ours, theirs = network(), network()
    optimizer = build_optimizer(config(weight_decay=0.0, momentum=0.0), ours)
    oracle = build_optimizer(config(weight_decay=0.01, momentum=0.0), theirs)
    step(theirs, oracle, TARGETS)
    images = torch.arange(20.0).reshape(5, 4).sin()
    (nn.functional.cross_entropy(ours(images), TARGETS) + penalty(config(l2=0.01), ours)).backward()
    optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_penalties_by_hand_count_weights_alone():
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -4.0]]))
        model[0].bias.fill_(100.0)
    assert float(torch.as_tensor(penalty(config(l1=0.5), model)).detach()) == 0.5 * 7
    assert float(torch.as_tensor(penalty(config(l2=0.5), model)).detach()) == 0.5 * 25 / 2
    assert penalty(config(), model) == 0.0


def test_a_penalty_is_part_of_training_and_shrinks_weights():
    from training.data import Split
    from training.loop import Batches

    split = Split(np.zeros((32, 2, 2, 1), np.uint8), np.zeros(32, np.int64))
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    before = float(model[1].weight.detach().abs().sum())
    chosen = config(l1=1.0, learning_rate=0.01, schedule="constant", weight_decay=0.0, translate=0.0)
    floats = nn.Sequential(Floats(), model)
    train_epoch(floats, Batches.on(torch.device("cpu"), split), chosen, 1)
    assert float(model[1].weight.detach().abs().sum()) < before  # images are black: nothing else moves the weights


class Floats(nn.Module):
    """uint8 → float32."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Convert."""
        return images.float()


def rates_of(scheduler: torch.optim.lr_scheduler.LRScheduler, optimizer: torch.optim.Optimizer, steps: int):
    """Return the rate that torch's scheduler gives each step."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_one_cycle_is_torchs():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=50, pct_start=0.3, cycle_momentum=False)
    wanted = rates_of(scheduler, optimizer, 49)
    chosen = config(schedule="one_cycle", learning_rate=0.4, warmup_share=0.3)
    assert [learning_rate(chosen, step, 50) for step in range(49)] == pytest.approx(wanted)


def test_cosine_without_warm_up_is_torchs():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.4)
    wanted = rates_of(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30), optimizer, 30)
    chosen = config(schedule="cosine", learning_rate=0.4, warmup_share=0.0)
    assert [learning_rate(chosen, step, 30) for step in range(30)] == pytest.approx(wanted)


def test_the_staircase_falls_after_each_whole_stretch():
    chosen = config(schedule="exponential", learning_rate=0.1, decay_rate=0.95, decay_steps=1000)
    found = [learning_rate(chosen, step, 5000) for step in (0, 999, 1000, 1999, 2000)]
    assert found == pytest.approx([0.1, 0.1, 0.095, 0.095, 0.09025])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_warm_up_climbs_from_a_25th_to_the_peak(schedule: str):
    chosen = config(schedule=schedule, learning_rate=1.0, warmup_share=0.2)
    rates = [learning_rate(chosen, step, 100) for step in range(101)]
    assert (rates[0], rates[20], rates[100]) == pytest.approx((0.04, 1.0, 0.0))
    assert max(rates) == rates[20]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "one_cycle", "exponential", "constant"])
@pytest.mark.parametrize("share, steps", [(0.0, 1), (0.0, 2), (0.5, 2), (0.99, 3), (0.2, 10)])
def test_every_schedule_is_finite_and_within_the_peak_in_the_shortest_runs(schedule: str, share: float, steps: int):
    chosen = config(schedule=schedule, learning_rate=0.3, warmup_share=share)
    rates = [learning_rate(chosen, step, steps) for step in range(steps)]
    assert all(math.isfinite(rate) and 0 <= rate <= 0.3 + 1e-12 for rate in rates)


def test_a_schedule_reaches_every_group_of_its_optimizer():
    optimizer = build_optimizer(config(), network())
    schedule = build_schedule(config(schedule="constant", learning_rate=0.7), optimizer, steps_per_epoch=4)
    assert schedule.apply(2) == 0.7
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.7]


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("optimizer", "adam", r"optimizer = adam \(did you mean adamw\?\)"),
        ("schedule", "cosin", r"did you mean cosine\?"),
        ("norm", "btach", r"did you mean batch\?"),
        ("dropout", 1.0, "dropout = 1"),
        ("decay_steps", 0, "decay_steps = 0"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest_name(key: str, value: object, words: str):
    with pytest.raises(UsageError, match=words):
        config(**{key: value})
