"""`training.parity`: the artifact's answers against the unfolded network in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from training.errors import ExportRefused
from training.parity import BATCH_SIZES, Reference, check, reference

IMAGES = np.random.default_rng(0).integers(0, 256, (130, 2, 2, 1), dtype=np.uint8)


def exact_run(images: np.ndarray) -> np.ndarray:
    """Two logits: the sum of the pixels, and 500."""
    sums = images.reshape(len(images), -1).astype(np.float32).sum(1)
    return np.stack([sums, np.full_like(sums, 500)], axis=1)


def wanted(noise: float = 1e-3) -> Reference:
    return Reference(exact_run(IMAGES).astype(np.float64), noise)


def test_an_artifact_that_agrees_passes_with_what_was_seen():
    seen = check(exact_run, IMAGES, wanted())
    assert (seen.images, seen.batch_sizes, seen.max_abs_difference, seen.argmax_flips) == (130, (1, 2, 7, 64), 0.0, 0)
    assert seen.float32_noise == 1e-3


def test_every_batch_size_sees_every_image():
    sizes: dict[int, int] = {}

    def counting(images: np.ndarray) -> np.ndarray:
        sizes[len(images)] = sizes.get(len(images), 0) + 1
        return exact_run(images)

    check(counting, IMAGES, wanted())
    assert sizes == {1: 130, 2: 65 + 1, 7: 18, 4: 1, 64: 2}  # 130 = 18 · 7 + 4 = 2 · 64 + 2


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_an_error_at_one_batch_size_alone_is_refused(batch_size: int):
    def wrong(images: np.ndarray) -> np.ndarray:
        return exact_run(images) + (0.1 if len(images) == batch_size else 0)

    with pytest.raises(ExportRefused, match=rf"at batch {batch_size} a logit is 0\.1 off.*nothing was written"):
        check(wrong, IMAGES, wanted())


def test_an_error_in_one_logit_of_one_image_is_refused():
    def wrong(images: np.ndarray) -> np.ndarray:
        logits = exact_run(images)
        logits[(images == IMAGES[77]).all((1, 2, 3)), 1] += 0.1
        return logits

    with pytest.raises(ExportRefused):
        check(wrong, IMAGES, wanted())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_answers_that_are_not_numbers_are_refused(value: float):
    def wrong(images: np.ndarray) -> np.ndarray:
        logits = exact_run(images)
        logits[(images == IMAGES[3]).all((1, 2, 3)), 0] = value
        return logits

    with pytest.raises(ExportRefused):
        check(wrong, IMAGES, wanted())


def test_a_reference_that_is_not_a_number_passes_nothing():
    with pytest.raises(ExportRefused):
        check(exact_run, IMAGES, Reference(exact_run(IMAGES).astype(np.float64), np.nan))


def test_differences_that_rounding_explains_pass_and_flips_of_ties_are_counted():
    reference = wanted()
    reference.logits[5] = [500.0, 500.004]
    close = reference.logits.copy()
    close[5] = [500.006, 500.004]  # 6 times the noise

    def rounded(images: np.ndarray) -> np.ndarray:
        keys = {image.tobytes(): index for index, image in enumerate(IMAGES)}
        return np.stack([close[keys[image.tobytes()]] for image in images])

    seen = check(rounded, IMAGES, reference)
    assert seen.argmax_flips == 1
    assert seen.max_abs_difference == pytest.approx(0.006, rel=1e-6)


def test_without_any_noise_one_float32_step_of_the_largest_logit_is_allowed():
    limit = Reference(np.array([[3.0, -8.0]]), 0.0).limit
    assert limit == 8 * 2.0**-23


def test_the_reference_is_float64_and_its_noise_is_that_of_float32():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, image):
            return self.linear(image.flatten(1).to(self.linear.weight.dtype))

    model = Model().double()
    with torch.no_grad():
        model.linear.weight.mul_(1 + 2**-40)  # no float32 number, so that a detour through float32 would show
    weight = model.linear.weight.detach().clone()
    found = reference(model, IMAGES)
    logits = IMAGES.reshape(-1, 4) @ weight.numpy().T + model.linear.bias.detach().numpy()
    assert found.logits.dtype == np.float64
    np.testing.assert_allclose(found.logits, logits, rtol=0, atol=1e-12)  # 4 terms below 255
    assert 0 < found.float32_noise < 255 * 4 * 5 * 2**-24
