"""`training.normalization.running`: corrections held against torch's own BatchNorm, guards, and the two switches."""

import copy

import pytest
import torch
from torch import nn

from training.normalization.layers import norm_records
from training.normalization.running import (
    StatisticsKeeper,
    correct,
    corrected,
    correction,
    drift,
    freeze_affine,
    freeze_gamma,
    freeze_statistics,
    snapshot,
)


def updated(momentum: float | None, batches: list[torch.Tensor]) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64).train()
    for batch in batches:
        norm(batch)
    return norm


def some_batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) * 2 + 5 for _ in range(count)]


@pytest.mark.parametrize("momentum", [0.001, 0.1, 0.9])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_corrected_statistics_are_the_weighted_average_of_the_batches_alone(momentum: float, count: int):
    batches = some_batches(count)
    mean, variance = corrected(updated(momentum, batches))
    weights = torch.tensor([momentum * (1 - momentum) ** (count - 1 - i) for i in range(count)], dtype=torch.float64)
    weights /= weights.sum()
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches])
    variances = torch.stack([batch.var((0, 2, 3), correction=1) for batch in batches])
    # dividing by 1 − r ≥ 0.001 enlarges 3 · 30 roundings of 2⁻⁵³ a thousandfold: 1e-11
    torch.testing.assert_close(mean, weights @ means, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(variance, weights @ variances, rtol=1e-11, atol=1e-11)


def test_after_one_batch_the_corrected_statistics_are_that_batch_whatever_the_momentum():
    (batch,) = some_batches(1)
    for momentum in (0.003, 0.1, 1.0):
        mean, variance = corrected(updated(momentum, [batch]))
        torch.testing.assert_close(mean, batch.mean((0, 2, 3)), rtol=1e-11, atol=0)
        torch.testing.assert_close(variance, batch.var((0, 2, 3), correction=1), rtol=1e-11, atol=0)


def test_what_was_never_updated_or_is_a_plain_average_stays_as_it_is():
    fresh, plain = updated(0.1, []), updated(None, some_batches(4))
    for norm in (fresh, plain):
        mean, variance = corrected(norm)
        assert torch.equal(mean, norm.running_mean)
        assert torch.equal(variance, norm.running_var)
    assert corrected(nn.BatchNorm2d(3, track_running_stats=False)) is None


def test_correction_is_for_a_while_and_leaves_the_raw_bits():
    model = nn.Sequential(updated(0.01, some_batches(5)).float())
    raw = copy.deepcopy(model.state_dict())
    with correction(model, is_on=True):
        within = copy.deepcopy(model.state_dict())
    assert not torch.equal(within["0.running_mean"], raw["0.running_mean"])
    assert all(torch.equal(value, raw[name]) for name, value in model.state_dict().items())
    with correction(model, is_on=False):
        assert all(torch.equal(value, raw[name]) for name, value in model.state_dict().items())


def test_the_share_of_the_start_is_told_of_raw_statistics_alone():
    model = nn.Sequential(updated(0.1, some_batches(3)))
    assert norm_records(model)[0].initial_share == pytest.approx(0.729)
    correct(model)
    assert norm_records(model, "corrected")[0].initial_share == 0, "told otherwise it would be corrected twice"


def test_a_keeper_puts_back_every_running_buffer():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    model(torch.randn(4, 2))
    keeper = StatisticsKeeper(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    loss = model(torch.full((4, 2), torch.nan)).sum()
    assert not keeper.is_finite(loss)
    keeper.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert keeper.is_finite(torch.tensor(1.0))
    assert not keeper.is_finite(torch.tensor(torch.inf))


def test_frozen_statistics_normalise_and_stay_while_gamma_and_beta_train():
    model = nn.Sequential(updated(0.1, some_batches(3)).float())
    model.train()
    freeze_statistics(model)
    before = snapshot(model)
    images = torch.randn(4, 3, 5, 5)
    answer = model(images)
    mean, variance = (value.view(1, 3, 1, 1) for value in before["0"])
    torch.testing.assert_close(answer, (images - mean) / (variance + model[0].eps).sqrt(), rtol=1e-5, atol=1e-6)
    answer.square().sum().backward()
    assert model[0].weight.grad.abs().min() > 0
    assert all(torch.equal(a, b) for a, b in zip(before["0"], snapshot(model)["0"], strict=True))


def test_a_frozen_affine_stays_while_statistics_move():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    freeze_affine(model)
    before = snapshot(model)
    model(torch.randn(4, 3, 5, 5) + 3).square().sum().backward()
    assert model[1].weight.grad is None
    assert model[1].bias.grad is None
    assert model[0].weight.grad is not None
    assert not torch.equal(before["1"][0], snapshot(model)["1"][0])


def test_a_frozen_gamma_stays_while_beta_trains_and_statistics_move():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False)).train()
    freeze_gamma(model)
    before = snapshot(model)
    (model(torch.randn(4, 3, 5, 5) + 3) ** 3).sum().backward()
    assert model[1].weight.grad is None
    assert model[1].bias.grad is not None
    assert not torch.equal(before["1"][0], snapshot(model)["1"][0])


def test_drift_is_in_standard_deviations_and_in_logarithms_of_the_worst_channel():
    before = {"n": (torch.tensor([0.0, 1.0]), torch.tensor([4.0, 1.0]))}
    after = {"n": (torch.tensor([1.0, 1.0]), torch.tensor([4.0, 0.25]))}
    (moved,) = drift(before, after, eps=0.0).values()
    assert moved == pytest.approx((0.5, 1.3862944), rel=1e-6)
    assert drift(after, after)["n"] == (0.0, 0.0)
