"""`training.normalization` and `training.architectures`: what BatchNorm layers hold, and networks with them."""

import copy

import pytest
import torch
from torch import nn

from training.architectures import ARCHITECTURES, build
from training.errors import UsageError
from training.normalization import batch_norms, initial_share, norm_records
from training.normalization.layers import taken_apart


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


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: what is dropped and activated afterwards belongs to it."""

    def __init__(self, features: int, drop: nn.Module, act: nn.Module):
        super().__init__(features)
        self.drop, self.act = drop, act

    def forward(self, features):
        return self.act(self.drop(super().forward(features)))


def network_of(*norms: nn.Module) -> nn.Module:
    """Convolutions, each with a BatchNorm that has seen a batch."""
    torch.manual_seed(0)
    network = nn.Sequential(*(part for norm in norms for part in (nn.Conv2d(3, 3, 3, padding=1), norm)))
    network.train()(torch.randn(8, 3, 5, 5) + 1)
    return network


def test_a_batchnorm_that_activates_too_is_taken_apart_without_changing_an_answer_or_a_parameter():
    bundled = network_of(NormAct(3, nn.Identity(), nn.ReLU()), NormAct(3, nn.Identity(), nn.Identity()))
    apart = taken_apart(copy.deepcopy(bundled))
    images = torch.randn(4, 3, 5, 5)
    for network in (bundled, apart):
        network.train()
    assert torch.equal(bundled(images), apart(images))
    assert torch.equal(bundled.eval()(images), apart.eval()(images))
    norms = dict(batch_norms(apart))
    assert list(norms) == ["1.norm", "3"]
    assert {type(norm) for norm in norms.values()} == {nn.BatchNorm2d}
    for mine, theirs in zip(norms.values(), (bundled[1], bundled[3]), strict=True):
        assert all(torch.equal(mine.state_dict()[name], theirs.state_dict()[name]) for name in mine.state_dict())


def test_taking_apart_shares_parameters_and_leaves_other_networks_alone():
    norm = NormAct(3, nn.Dropout(0.5), nn.SiLU())
    apart = taken_apart(nn.Sequential(norm))
    assert apart[0].norm.weight is norm.weight
    assert apart[0].norm.running_var is norm.running_var
    assert [type(one) for one in apart[0]] == [nn.BatchNorm2d, nn.Dropout, nn.SiLU]
    plain = network_of(nn.BatchNorm2d(3))
    assert taken_apart(plain)[1] is plain[1]
