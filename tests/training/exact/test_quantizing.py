"""Weights as integers: within the bound always, with fewer bits only where it asks for them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.independence.exactness.proof import LIMIT, partial_sums
from training.errors import NotConvertible
from training.exact.quantizing import correct_bias, quantize


@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.integers(1, 6),
    terms=st.integers(1, 4000),
    spread=st.floats(0.0, 4.0),
    x_zero=st.sampled_from([0, 2, 128, 254]),
    x_scale=st.floats(1e-4, 10),
    shared=st.booleans(),
)
def test_bounds_hold_and_a_weight_is_off_by_half_a_step_at_most(seed, channels, terms, spread, x_zero, x_scale, shared):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(channels, terms)) * np.exp(spread * rng.normal(size=(channels, 1)))
    bias = rng.normal(size=channels) * 3
    done = quantize("layer", weight, bias, x_scale, x_zero, shared=shared)
    sums = partial_sums(done.weight, done.bias, x_zero)
    assert (sums < LIMIT).all()
    assert np.abs(done.weight.astype(int)).max() <= 127
    off = np.abs(done.real_weight(x_scale) - weight) * x_scale
    assert (off <= done.step[:, None] * (0.5 + 1e-9)).all()
    assert (np.abs(done.bias * done.step - bias) <= done.step * (0.5 + 1e-9)).all()
    if shared:
        assert len(set(done.step)) == 1


def test_bits_fall_in_the_channels_that_ask_for_it_and_in_no_other():
    weight = np.tile([0.5, -0.5], (3, 500))
    weight[1] = 0.5  # one sign: 255 · 1000 · 127 is over 2^24, · 63 is not
    weight[0, 500:] = 0
    weight[2] *= 10
    done = quantize("layer", weight, np.zeros(3), 1.0, 0)
    assert done.bits == 7
    assert list(np.abs(done.weight).max(1)) == [127, 63, 127]


def test_signed_inputs_are_bound_by_both_signs():
    """With a zero point a negative input meets a negative weight: signs no longer halve the sum."""
    weight = np.tile([1.0, -1.0], 500)[None]
    assert quantize("layer", weight, np.zeros(1), 1.0, 0).bits == 8
    assert quantize("layer", np.tile(weight, (1, 2)), np.zeros(1), 1.0, 0).bits == 7


def test_a_bound_that_4_bits_cannot_keep_is_refused_by_layer_and_channel():
    weight = np.full((4, 10_000), 0.01)
    weight[:2], weight[3, 5000:] = 0, 0
    with pytest.raises(NotConvertible, match=r"layer blocks\.3\.conv: at 4 bits output channel 2 .*16,777,216"):
        quantize("blocks.3.conv", weight, np.zeros(4), 0.05, 0)


def test_a_channel_of_zero_weights_keeps_its_bias():
    weight = np.array([[0.0, 0.0], [0.3, -0.2]])
    done = quantize("layer", weight, np.array([0.7, 0.1]), 0.02, 0)
    assert not done.weight[0].any()
    assert done.bias[0] * done.step[0] == pytest.approx(0.7, abs=done.step[0])


def test_a_bias_far_larger_than_its_weights_leaves_the_sum_room():
    done = quantize("layer", np.full((1, 9), 1e-6), np.array([5.0]), 0.01, 0)
    assert partial_sums(done.weight, done.bias, 0)[0] < LIMIT
    assert done.bias[0] * done.step[0] == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_bias_correction_gives_back_the_mean_that_rounding_took(groups: int):
    """Against the means of the outputs in float64, image by image: a 1 × 1 convolution is linear, so they agree."""
    rng = np.random.default_rng(groups)
    weight, bias = rng.normal(size=(6, 6 // groups, 1, 1)), rng.normal(size=6)
    rounded = np.rint(weight * 4) / 4
    images = rng.normal(1, 2, size=(50, 6, 3, 3))

    def outputs(used: np.ndarray, shift: np.ndarray) -> np.ndarray:
        per = 6 // groups
        parts = [
            np.einsum("nchw,kc->nkhw", images[:, at * per : (at + 1) * per], used[at * per : (at + 1) * per, :, 0, 0])
            for at in range(groups)
        ]
        return (np.concatenate(parts, 1) + shift[None, :, None, None]).mean((0, 2, 3))

    corrected = correct_bias(weight, rounded, bias, images.mean((0, 2, 3)), groups)
    np.testing.assert_allclose(outputs(rounded, corrected), outputs(weight, bias), rtol=0, atol=1e-12)
    assert np.abs(outputs(rounded, bias) - outputs(weight, bias)).max() > 0.01
