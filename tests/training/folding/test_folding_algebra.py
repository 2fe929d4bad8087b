"""`training.folding.algebra` against convolution, then BatchNorm, in float64, and against torch's own fold."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from training_support import relative_difference

from training.errors import NotFoldable
from training.folding.algebra import Norm, fold_into_conv, fold_into_linear

CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
# Both sides sum at most 8 · 3³ + 2 terms in float64, so each is within about 250 · 2⁻⁵³ = 3e-14 of the magnitude of its
# terms. Folding computes s·b − s·μ where the two steps compute s·(b − μ): cancellation between terms costs some of it,
# and the scale of the comparison (see `_magnitude`) counts every term by its size. A wrong axis or sign is off by 1.
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Case:
    """A convolution, its input, and the BatchNorm after it."""

    images: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm: Norm
    groups: int
    transposed: bool

    @property
    def convolve(self):
        return (TRANSPOSED if self.transposed else CONV)[self.weight.ndim - 2]

    def two_steps(self) -> torch.Tensor:
        norm = self.norm
        mean, variance, gamma, beta = (
            None if values is None else torch.from_numpy(values)
            for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        features = self.convolve(self.images, self.weight, self.bias, groups=self.groups)
        return functional.batch_norm(features, mean, variance, gamma, beta, training=False, eps=norm.eps)

    def one_step(self) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.numpy()
        weight, bias = fold_into_conv(
            self.weight.numpy(), bias, self.norm, transposed=self.transposed, groups=self.groups
        )
        return self.convolve(self.images, torch.from_numpy(weight), torch.from_numpy(bias), groups=self.groups)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dims, groups, transposed = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.booleans())
    inputs = groups * draw(st.integers(1, 2))  # with 1 and 1 it is depthwise
    outputs = groups * draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def array(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    shape = (inputs, outputs // groups, *kernel) if transposed else (outputs, inputs // groups, *kernel)
    spread = 10 ** draw(st.floats(-3, 3))  # of the variance: from a nearly dead channel to a loud one
    norm = Norm(
        running_mean=array(outputs) * draw(st.sampled_from([0.0, 1.0, 100.0])),
        running_var=rng.random(outputs) * spread,
        eps=10 ** draw(st.floats(-12, -1)),
        weight=array(outputs) * draw(st.sampled_from([-1.0, 1.0, 1e-3])) if draw(st.booleans()) else None,
        bias=array(outputs) if draw(st.booleans()) else None,
    )
    bias = torch.from_numpy(array(outputs)) if draw(st.booleans()) else None
    images = torch.from_numpy(array(2, inputs, *[size + 1 for size in kernel]))
    return Case(images, torch.from_numpy(array(*shape)), bias, norm, groups, transposed)


def _magnitude(case: Case) -> float:
    """Return the size of the terms that either way adds up: the scale on which float64 rounds."""
    scale, _ = case.norm.scale_and_shift()
    features = case.convolve(case.images.abs(), case.weight.abs(), None, groups=case.groups).amax()
    terms = float(features) + (0 if case.bias is None else case.bias.abs().numpy())
    beta = 0 if case.norm.bias is None else np.abs(case.norm.bias)
    return float((np.abs(scale) * (terms + np.abs(case.norm.running_mean)) + beta).max())


@settings(max_examples=200, deadline=None)
@given(cases())
def test_folded_convolution_equals_convolution_then_batchnorm(case: Case):
    difference = float((case.one_step() - case.two_steps()).abs().max())
    assert difference <= TOLERANCE * _magnitude(case)


@settings(max_examples=100, deadline=None)
@given(cases().filter(lambda case: case.groups == 1 or not case.transposed))  # torch's own is wrong for the others
def test_folded_weights_equal_those_of_torch(case: Case):
    norm, transposed = case.norm, case.transposed
    outputs = len(norm.running_mean)
    wanted = fuse_conv_bn_weights(
        case.weight,
        case.bias,
        torch.from_numpy(norm.running_mean),
        torch.from_numpy(norm.running_var),
        norm.eps,
        torch.from_numpy(np.ones(outputs) if norm.weight is None else norm.weight),
        torch.from_numpy(np.zeros(outputs) if norm.bias is None else norm.bias),
        transpose=transposed,
    )
    bias = None if case.bias is None else case.bias.numpy()
    weight, bias = fold_into_conv(case.weight.numpy(), bias, norm, transposed=transposed, groups=case.groups)
    # Some roundings each of 2⁻⁵³ in another order; the bias may lose what cancels between s·b, s·μ and β.
    np.testing.assert_allclose(weight, wanted[0].detach().numpy(), rtol=1e-14)
    np.testing.assert_allclose(bias, wanted[1].detach().numpy(), atol=1e-14 * max(_magnitude(case), 1.0))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 6), st.booleans(), st.floats(-12, -1), st.integers(0, 2**32 - 1)
)  # inputs and outputs, so equal ones too
def test_folded_linear_layer_equals_linear_then_batchnorm(inputs: int, outputs: int, has_bias, log_eps, seed):
    rng = np.random.default_rng(seed)
    weight, bias = rng.standard_normal((outputs, inputs)), rng.standard_normal(outputs) if has_bias else None
    gamma, beta, mean, variance = (*rng.standard_normal((3, outputs)), rng.random(outputs) + 0.01)
    folded = fold_into_linear(weight, bias, Norm(mean, variance, 10**log_eps, gamma, beta))
    wanted = fuse_linear_bn_weights(
        torch.from_numpy(weight),
        torch.from_numpy(np.zeros(outputs) if bias is None else bias),
        *(torch.from_numpy(values) for values in (mean, variance)),
        10**log_eps,
        torch.from_numpy(gamma),
        torch.from_numpy(beta),
    )
    images = torch.from_numpy(rng.standard_normal((4, inputs)))
    found = functional.linear(images, *(torch.from_numpy(values) for values in folded))
    assert relative_difference(found, functional.linear(images, *wanted)) <= TOLERANCE


def test_padding_of_any_mode_does_not_matter_for_a_batchnorm_after_the_convolution():
    torch.manual_seed(0)
    norm = Norm(np.array([0.5, -2.0]), np.array([0.3, 4.0]), 1e-5, np.array([-1.0, 2.0]), np.array([0.1, 0.2]))
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for mode in ("zeros", "reflect", "replicate", "circular"):
        conv = nn.Conv2d(3, 2, 3, padding=1, padding_mode=mode, dtype=torch.float64)
        bn = nn.BatchNorm2d(2, dtype=torch.float64).eval()
        for name, values in {"running_mean": norm.running_mean, "running_var": norm.running_var}.items():
            getattr(bn, name).copy_(torch.from_numpy(values))
        bn.load_state_dict({"weight": torch.from_numpy(norm.weight), "bias": torch.from_numpy(norm.bias)}, strict=False)
        wanted = bn(conv(images))
        weight, bias = fold_into_conv(conv.weight.detach().numpy(), conv.bias.detach().numpy(), norm)
        conv.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        assert relative_difference(conv(images), wanted) <= TOLERANCE, mode


def test_folding_is_computed_in_float64_whatever_comes_in():
    norm = Norm(np.zeros(2), np.array([1 / 3, 3.0]), 1e-5)
    weight, bias = fold_into_conv(np.ones((2, 1, 1, 1), np.float32), np.ones(2, np.float32), norm)
    assert weight.dtype == bias.dtype == np.float64
    np.testing.assert_array_equal(weight.ravel(), 1 / np.sqrt(np.array([1 / 3, 3.0]) + 1e-5))


def _norm(**changed) -> Norm:
    sound = {"running_mean": np.zeros(3), "running_var": np.ones(3), "eps": 1e-5}
    return Norm(**{**sound, "weight": np.ones(3), "bias": np.zeros(3), **changed})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_values_that_are_not_finite_are_refused_with_name_and_channel(name: str, value: float):
    with pytest.raises(NotFoldable, match=f"{name} is not finite in channel 2"):
        _norm(**{name: np.array([0.5, 0.5, value])}).scale_and_shift()


def test_negative_variance_is_refused_even_where_eps_would_hide_it():
    with pytest.raises(NotFoldable, match="running_var is negative in channel 1"):
        _norm(running_var=np.array([1.0, -1e-9, 1.0]), eps=1e-3).scale_and_shift()


def test_variance_plus_eps_of_zero_is_refused():
    with pytest.raises(NotFoldable, match=r"running_var \+ eps is 0 in channel 0"):
        _norm(running_var=np.array([0.0, 1.0, 1.0]), eps=0.0).scale_and_shift()


def test_zero_variance_is_fine_where_eps_is_not_zero():
    scale, _ = _norm(running_var=np.zeros(3), eps=1e-4).scale_and_shift()
    np.testing.assert_allclose(scale, 100, rtol=1e-15)


@pytest.mark.parametrize(("shape", "transposed", "groups"), [((4, 2, 3), False, 1), ((2, 4, 3), True, 1)])
def test_another_number_of_statistics_than_channels_is_refused(shape, transposed, groups):
    with pytest.raises(NotFoldable, match="3 statistics for 4 output channels"):
        fold_into_conv(np.ones(shape), None, _norm(), transposed=transposed, groups=groups)


def test_a_grouped_transposed_convolution_counts_its_outputs_over_all_groups():
    with pytest.raises(NotFoldable, match="3 statistics for 6 output channels"):
        fold_into_conv(np.ones((4, 3, 2)), None, _norm(), transposed=True, groups=2)
