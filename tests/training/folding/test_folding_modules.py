"""`training.folding.modules`: what is folded, what stays and why, and the proof on data."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training_support import aged, relative_difference

from training.architectures import ARCHITECTURES, build
from training.errors import NotFoldable
from training.folding import modules
from training.folding.modules import Folded, fold, verify
from training.folding.rounding import TOLERANCE
from training.normalization import batch_norms


def _images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _fold_and_compare(model: nn.Module, images: torch.Tensor) -> Folded:
    """Fold and verify an aged model, and hold the result against the model itself in float64."""
    wanted = copy.deepcopy(model).double()(images)
    folded = verify(fold(model, images), images)
    assert relative_difference(folded.module(images), wanted) <= TOLERANCE
    assert torch.equal(folded.unfolded(images), wanted)
    return folded


@pytest.mark.parametrize("size", [28, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_each_architecture_folds_completely_and_computes_the_same(name: str, channels: int, size: int):
    model = aged(build(name, channels=channels, classes=10, size=size, bn_momentum=0.1))
    folded = _fold_and_compare(model, _images(3, channels, size, size))
    assert {record.norm for record in folded.folds} == {name for name, _ in batch_norms(model)}
    assert folded.kept == ()
    assert list(batch_norms(folded.module)) == []


def test_small_images_have_a_small_network_that_folds_completely():
    model = aged(build("small_cnn", channels=1, classes=10, size=8, bn_momentum=0.1))
    assert _fold_and_compare(model, _images(3, 1, 8, 8)).kept == ()


@settings(max_examples=40, deadline=None)
@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    transposed=st.booleans(),
    has_bias=st.booleans(),
    is_affine=st.booleans(),
    eps=st.floats(-12, -1).map(lambda exponent: 10**exponent),
    seed=st.integers(0, 1000),
)
def test_a_convolution_of_any_kind_takes_its_batchnorm_in(
    dims, groups, widths, transposed, has_bias, is_affine, eps, seed
):
    torch.manual_seed(seed)
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else (
        nn.Conv1d, nn.Conv2d, nn.Conv3d
    )  # fmt: skip
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    inputs, outputs = groups * widths[0], groups * widths[1]
    conv = kinds[dims - 1](inputs, outputs, 2, stride=2, padding=1, groups=groups, bias=has_bias)
    model = aged(nn.Sequential(conv, norm(outputs, eps=eps, affine=is_affine)), seed)
    folded = _fold_and_compare(model, _images(2, inputs, *[5] * dims))
    assert [record.into for record in folded.folds] == ["0"]


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4, affine=False), nn.SyncBatchNorm(4)], ids=["without γ and β", "synchronised"]
)
def test_other_kinds_of_batchnorm_fold_too(norm: nn.Module):
    folded = _fold_and_compare(aged(nn.Sequential(nn.Conv2d(3, 4, 3), norm)), _images(2, 3, 6, 6))
    assert len(folded.folds) == 1


def test_a_batchnorm_without_beta_folds_as_beta_zero():
    norm = nn.BatchNorm2d(4)
    model = aged(nn.Sequential(nn.Conv2d(3, 4, 3), norm))
    norm.register_parameter("bias", None)
    assert len(_fold_and_compare(model, _images(2, 3, 6, 6)).folds) == 1


def test_a_linear_layer_takes_in_the_batchnorm_of_its_features():
    model = aged(nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)))
    folded = _fold_and_compare(model, _images(7, 5))
    assert [(record.norm, record.into, record.kind) for record in folded.folds] == [("1", "0", "Linear")]


@pytest.mark.parametrize("length", [4, 6], ids=["as many steps as features", "another number"])
def test_a_linear_layer_over_sequences_is_not_folded_wrongly(length: int):
    # (N, L, C) through Linear is (N, L, K); BatchNorm1d normalizes axis 1, the steps, and not the features
    model = aged(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(length)))
    images = _images(3, length, 5)
    wanted = copy.deepcopy(model).double()(images)
    folded = fold(model, images)
    assert relative_difference(folded.module(images), wanted) <= TOLERANCE


def test_a_linear_layer_over_sequences_is_never_certified_with_a_wrong_fold():
    model = aged(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    images = _images(3, 4, 5)
    try:
        folded = verify(fold(model, images), images)
    except NotFoldable:
        return
    assert relative_difference(folded.module(images), model.double()(images)) <= TOLERANCE


def test_a_batchnorm_shared_by_two_convolutions_folds_into_both():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, images):
            return self.norm(self.second(self.norm(self.first(images))))

    folded = _fold_and_compare(aged(Shared()), _images(2, 3, 8, 8))
    assert {record.into for record in folded.folds} <= {"first", "second"}


def test_two_convolutions_of_one_input_fold_each_its_own_batchnorm():
    # two of these on one input collided in torch.onnx.export's own fold (pytorch#166797)
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
            self.right = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))

        def forward(self, images):
            return self.left(images) + self.right(images)

    assert len(_fold_and_compare(aged(Branches()), _images(2, 3, 6, 6)).folds) == 2


def test_two_convolutions_that_share_a_weight_do_not_share_its_fold():
    model = aged(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)))
    model[3].weight = model[0].weight
    assert len(_fold_and_compare(model, _images(2, 3, 4, 4)).folds) == 1


def test_the_models_own_layers_are_left_alone():
    model = aged(build("small_resnet", channels=1, classes=10, size=28, bn_momentum=0.1))
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    with torch.no_grad():
        for parameter in folded.module.parameters():
            parameter.zero_()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(list(batch_norms(model))) == len(folded.folds)


def test_the_account_says_how_large_scales_and_weights_became():
    model = aged(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    (record,) = fold(model).folds
    norm = model[1].double()
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs().detach()
    weight = model[0].weight.double() * (norm.weight / (norm.running_var + norm.eps).sqrt()).reshape(-1, 1, 1, 1)
    # the scale is one division and one root in another order: 2 roundings
    assert record.scale_min == pytest.approx(float(scale.min()), rel=1e-15)
    assert record.scale_max == pytest.approx(float(scale.max()), rel=1e-15)
    assert record.weight_max == pytest.approx(float(weight.detach().abs().max()), rel=1e-15)


def test_verify_fills_in_the_error_of_every_fold():
    folded = fold(aged(build("small_resnet", channels=1, classes=10, size=28, bn_momentum=0.1)))
    assert {record.error for record in folded.folds} == {None}
    errors = [record.error for record in verify(folded, _images(2, 1, 28, 28)).folds]
    assert all(error is not None and 0 <= error <= TOLERANCE for error in errors)
    assert any(errors), "two orders of summation never agree to the last bit in every layer"


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_verify_names_the_layer_of_a_fold_that_was_tampered_with(what: str):
    folded = fold(aged(build("small_cnn", channels=1, classes=10, size=28, bn_momentum=0.1)))
    record = folded.folds[2]
    with torch.no_grad():
        getattr(folded.module.get_submodule(record.into), what)[0] += 1e-6  # 10⁴ times what is allowed
    with pytest.raises(NotFoldable, match=record.norm.replace(".", r"\.")):
        verify(folded, _images(2, 1, 28, 28))


def test_verify_sees_every_image_however_few_are_run_at_once(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    folded = fold(aged(build("small_cnn", channels=1, classes=10, size=8, bn_momentum=0.1)))
    images = _images(5, 1, 8, 8)
    images[3] *= 100  # the largest magnitudes lie in neither the first part nor the last
    whole = verify(folded, images)
    monkeypatch.setattr(modules, "PIXELS_AT_ONCE", 64)
    parts = verify(folded, images)
    for account in ("float32", "float32_unfolded"):  # float64's own rounding follows the batch's size
        assert getattr(parts.end_to_end, account) == pytest.approx(getattr(whole.end_to_end, account), rel=0.5)
    images[3] = float("nan")
    with pytest.raises(NotFoldable):
        verify(folded, images)


def test_verify_refuses_answers_that_are_not_numbers():
    folded = fold(aged(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))))
    with torch.no_grad():
        folded.module.get_submodule("0").weight.fill_(torch.nan)
    with pytest.raises(NotFoldable, match="1: folded and unfolded differ"):
        verify(folded, _images(2, 1, 4, 4))


def test_verify_returns_the_same_modules():
    folded = fold(aged(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))))
    verified = verify(folded, _images(2, 1, 4, 4))
    assert replace(verified, folds=folded.folds, end_to_end=None) == folded
