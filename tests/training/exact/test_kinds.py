"""Every kind of layer that a classifier may have converts, computes the same integers everywhere, and stays near."""

import numpy as np
import onnx
import pytest
import torch
from conversion_kinds import KINDS
from conversion_support import (
    Made,
    artifact_of,
    assert_same_integers,
    exact_of,
    logits_of,
    random_images,
    smooth_images,
)

from training.exact.reading import read_network

# What 8 bits cost here, measured: 0.1 to 2 % of the logits' spread; a wrong axis, scale or padding costs over 20 %.
NEAR = 0.04


@pytest.fixture(scope="module", params=KINDS)
def case(request) -> tuple[int, onnx.ModelProto, Made]:
    channels, build = KINDS[request.param]
    torch.manual_seed(1)
    model = artifact_of(build(), channels)
    return channels, model, exact_of(read_network(model), smooth_images(256, channels))


def test_every_execution_has_the_integers_bits_on_random_and_on_smooth_images(case):
    channels, _, made = case
    ends = np.stack([np.full((12, 12, channels), value, np.uint8) for value in (0, 255)])
    images = np.concatenate([random_images(12, channels), smooth_images(12, channels, seed=1), ends])
    assert_same_integers(made.model, images, batches=(1, 7))


def test_logits_stay_near_the_float_forms(case):
    channels, model, made = case
    images = smooth_images(64, channels, seed=2)  # others than those of calibration
    wanted = logits_of(model, images)
    error = np.sqrt(((logits_of(made.model, images) - wanted) ** 2).mean())
    assert error < NEAR * wanted.std()
