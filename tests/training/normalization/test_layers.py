"""`training.normalization` and `training.architectures`: what BatchNorm layers hold, and networks with them."""

import pytest
import torch
from torch import nn

from training.architectures import ARCHITECTURES, build
from training.errors import UsageError
from training.normalization import batch_norms, initial_share, norm_records


def test_no_update_leaves_all_of_the_initial_statistics():
    assert initial_share(0.1, 0) == 1.0


@pytest.mark.parametrize(("momentum", "updates", "share"), [(0.1, 1, 0.9), (0.01, 100, 0.3660323), (0.5, 3, 0.125)])
def test_the_initial_share_follows_the_closed_form(momentum: float, updates: int, share: float):
    assert initial_share(momentum, updates) == pytest.approx(share, rel=1e-6)  # the digits written here


@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("updates", [1, 5, 40])
def test_the_initial_share_is_what_a_real_batchnorm_keeps_of_its_start(momentum: float, updates: int):
    # batches of mean 5 and no variance: mean → 5 · (1 − share), variance → share
    norm = nn.BatchNorm1d(1, momentum=momentum, dtype=torch.float64).train()
    for _ in range(updates):
        norm(torch.full((4, 1), 5.0, dtype=torch.float64))
    share = initial_share(momentum, int(norm.num_batches_tracked))
    # each update rounds three times in float64: 40 · 3 · 2⁻⁵³ = 1.3e-14
    assert float(norm.running_var) == pytest.approx(share, rel=2e-14)
    assert float(norm.running_mean) == pytest.approx(5 * (1 - share), rel=2e-14)


def test_a_bias_that_is_gone_is_told_from_one_that_is_not():
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.5), nn.BatchNorm1d(2, momentum=None))
    for _ in range(4):
        model(torch.randn(3, 2))
    first, second = norm_records(model)
    assert (first.num_batches_tracked, first.initial_share, first.momentum) == (4, 0.0625, 0.5)
    assert second.initial_share is None, "a cumulative average keeps nothing of its start in a way momentum could tell"


def test_records_name_every_batchnorm_in_order_with_its_own_eps():
    model = nn.Sequential(nn.BatchNorm1d(2, eps=1e-3), nn.Sequential(nn.ReLU(), nn.BatchNorm3d(2, eps=1e-12)))
    assert [(record.norm, record.eps) for record in norm_records(model)] == [("0", 1e-3), ("1.1", 1e-12)]


def test_a_batchnorm_that_counts_nothing_has_no_share():
    (record,) = norm_records(nn.BatchNorm2d(2, track_running_stats=False))
    assert record.num_batches_tracked is None
    assert record.initial_share is None


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
def test_each_architecture_gives_logits_and_takes_its_batchnorm_momentum(name: str, size: int, channels: int):
    model = build(name, channels=channels, classes=7, size=size, bn_momentum=0.03)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)
    norms = dict(batch_norms(model))
    assert norms
    assert {norm.momentum for norm in norms.values()} == {0.03}


def test_an_unknown_architecture_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"small_cn is not known \(did you mean small_cnn\?\)"):
        build("small_cn", channels=1, classes=2, size=28, bn_momentum=0.1)
