"""`training.folding.modules`: statistics that are refused, and BatchNorm that stays because folding would be wrong."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from training_support import aged, relative_difference

from training.errors import NotFoldable
from training.folding.modules import fold, verify
from training.folding.rounding import TOLERANCE
from training.normalization import batch_norms


def _model() -> nn.Sequential:
    head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.ReLU(), head)


def _training_mode(model: nn.Sequential) -> None:
    model[2][1].train()


def _no_statistics(model: nn.Sequential) -> None:
    model[2][1] = nn.BatchNorm2d(4, track_running_stats=False).eval()


def _never_updated(model: nn.Sequential) -> None:
    model[2][1].num_batches_tracked.zero_()


def _initial_statistics(model: nn.Sequential) -> None:
    """As a loader leaves it that counts batches or fills γ and β, but skips the statistics."""
    model[2][1].running_mean.zero_()
    model[2][1].running_var.fill_(1)


def _initial_statistics_without_counter(model: nn.Sequential) -> None:
    """As an old checkpoint leaves it: `num_batches_tracked` came with torch 0.4.1."""
    _initial_statistics(model)
    model[2][1].num_batches_tracked = None


def _not_finite(model: nn.Sequential) -> None:
    model[2][1].running_mean[1] = torch.nan


def _negative_variance(model: nn.Sequential) -> None:
    model[2][1].running_var[3] = -0.5


@pytest.mark.parametrize(
    ("damage", "reason", "mend"),
    [
        (_training_mode, "training mode", r"model\.eval\(\)"),
        (_no_statistics, "no running statistics", "track_running_stats=True"),
        (_never_updated, "never updated", "load a checkpoint that holds its buffers"),
        (_initial_statistics, "initial statistics", "load a checkpoint that holds its buffers"),
        (_initial_statistics_without_counter, "initial statistics", "load a checkpoint that holds its buffers"),
        (_not_finite, "running_mean is not finite in channel 1", ""),
        (_negative_variance, "running_var is negative in channel 3", ""),
    ],
)
def test_untrustworthy_statistics_are_refused_with_the_layer_and_the_mend(
    damage: Callable[[nn.Sequential], None], reason: str, mend: str
):
    model = aged(_model())
    fold(model)  # sound before the damage
    damage(model)
    with pytest.raises(NotFoldable, match=rf"BatchNorm 2\.1.*{reason}.*{mend}"):
        fold(model)


def test_a_refused_model_keeps_its_mode_and_its_numbers():
    model = aged(_model())
    _training_mode(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotFoldable):
        fold(model)
    assert model[2][1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class UsedElsewhere(nn.Module):
    """What the convolution says is also added past its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, images):
        features = self.conv(images)
        return self.norm(features) + features


class ReadsTheWeight(nn.Module):
    """The convolution's weight is used again, and not for a convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, images):
        return self.norm(self.conv(images)) * self.conv.weight.mean()


class DropsAlways(nn.Module):
    """A call of dropout without `training=`, which is active in evaluation mode too; here with a probability of 0."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, images):
        return self.norm(functional.dropout(self.conv(images), 0.0))


def _parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), nn.BatchNorm2d(3))


def _after(kind: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3), kind, nn.BatchNorm2d(3))


@pytest.mark.parametrize(
    ("model", "norm", "reason"),
    [
        (UsedElsewhere(), "norm", "used elsewhere"),
        (ReadsTheWeight(), "norm", "parameters of conv are read elsewhere"),
        (DropsAlways(), "norm", "dropout"),
        (_after(nn.ReLU()), "2", "a ReLU lies between"),
        (_after(nn.Sigmoid()), "2", "neither a convolution nor a linear layer"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), "0", "neither"),
        (_parametrized(), "1", "parametriz"),
    ],
    ids=[
        "used elsewhere",
        "weight read",
        "a dropout that is told nothing",
        "after ReLU",
        "after Sigmoid",
        "before",
        "weight norm",
    ],
)
def test_batchnorm_that_cannot_fold_stays_with_a_reason_and_the_answer_is_right(model: nn.Module, norm: str, reason):
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    aged(model)
    wanted = copy.deepcopy(model).double()(images).detach()
    folded = verify(fold(model), images)
    assert relative_difference(folded.module(images).detach(), wanted) <= TOLERANCE
    assert folded.folds == ()
    assert [record.norm for record in folded.kept] == [norm]
    assert re.search(reason, folded.kept[0].reason)
    assert [name for name, _ in batch_norms(folded.module)] == [norm]


def test_one_batchnorm_that_stays_does_not_keep_the_others():
    model = aged(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded = verify(fold(model), images)
    assert ([record.norm for record in folded.folds], [record.norm for record in folded.kept]) == (["1"], ["3"])
    assert relative_difference(folded.module(images), copy.deepcopy(model).double()(images)) <= TOLERANCE


def test_layers_called_by_keyword_are_handled():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, images):
            return self.norm(input=self.conv(input=images))

    model = aged(Keywords())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded = verify(fold(model), images)
    assert len(folded.folds) + len(folded.kept) == 1
    assert relative_difference(folded.module(images), copy.deepcopy(model).double()(images)) <= TOLERANCE
