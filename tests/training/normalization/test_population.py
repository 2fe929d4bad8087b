"""`training.normalization.population`: estimates held against torch and NumPy in float64 over all images together."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.architectures import build
from training.errors import RunError
from training.normalization import batch_norms
from training.normalization.population import estimate

# 5,000 float32 values per channel enter float64 sums exactly; writing the float32 buffer rounds once
ROUNDED = {"rtol": 2**-23, "atol": 1e-7}


def images_of(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 2, 6, 6, generator=generator) * (1 + i) + 3 * i for i, size in enumerate(sizes)]


def test_the_first_layer_gets_mean_and_unbiased_variance_of_all_images_together():
    batches = images_of(7, 50, 3)  # unequal, and of unlike means: the spread between them counts
    model = nn.Sequential(nn.BatchNorm2d(2))
    estimate(model, batches)
    whole = torch.cat(batches).double().numpy().transpose(1, 0, 2, 3).reshape(2, -1)
    np.testing.assert_allclose(model[0].running_mean, whole.mean(1), **ROUNDED)
    np.testing.assert_allclose(model[0].running_var, whole.var(1, ddof=1), **ROUNDED)


def test_an_average_of_batch_variances_would_be_far_too_small_on_sorted_classes():
    batches = [torch.randn(20, 2, 6, 6) + 10 * index for index in range(5)]
    model = nn.Sequential(nn.BatchNorm2d(2))
    estimate(model, batches)
    average = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
    assert (model[0].running_var > 100 * average).all()


def test_deeper_layers_see_what_earlier_ones_make_of_each_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm2d(4)).train()
    batches = images_of(8, 24)
    twin = copy.deepcopy(model).double()
    inputs = []
    for batch in batches:  # torch's own layers in float64, on batch statistics, without dropout
        features = twin[0](batch.double())
        inputs.append(twin[2](twin[1](features)).detach().numpy())
    whole = np.concatenate(inputs).transpose(1, 0, 2, 3).reshape(4, -1)
    estimate(model, batches)
    # float32 convolutions of 18 terms of size 3: relative 18 · 2⁻²⁴ each, averaged over thousands
    np.testing.assert_allclose(model[4].running_mean, whole.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model[4].running_var, whole.var(1, ddof=1), rtol=1e-5)
    assert model.training, "modes come back"
    assert all(norm.track_running_stats for _, norm in batch_norms(model))


def test_dropout_does_not_shift_what_is_measured():
    plain, dropping = (nn.Sequential(nn.Dropout(p), nn.BatchNorm2d(2)).train() for p in (0.0, 0.9))
    for model in (plain, dropping):
        estimate(model, images_of(30))
    assert torch.equal(plain[1].running_var, dropping[1].running_var)


def test_the_order_of_images_within_and_between_batches_of_one_layer_does_not_matter():
    batches = images_of(9, 9)
    first, second = nn.Sequential(nn.BatchNorm2d(2)), nn.Sequential(nn.BatchNorm2d(2))
    estimate(first, batches)
    estimate(second, [torch.cat(batches).flip(0)])
    torch.testing.assert_close(first[0].running_var, second[0].running_var, **ROUNDED)


def test_an_input_that_is_not_finite_is_refused_by_layer_and_nothing_is_written():
    model = build("small_cnn", channels=1, classes=3, size=12, bn_momentum=0.1)
    before = {name: value.clone() for name, value in model.named_buffers()}
    images = torch.randn(4, 1, 12, 12)
    images[2, 0, 3, 3] = torch.inf
    with pytest.raises(RunError, match=r"BatchNorm block1\.norm has an input that is not finite"):
        estimate(model, [torch.randn(4, 1, 12, 12), images])
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_layer_that_is_used_twice_is_measured_over_both_uses():
    class Twice(nn.Module):
        """One BatchNorm, two inputs."""

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, images):
            return self.norm(images) + self.norm(images + 4)

    model = Twice()
    (batch,) = images_of(20)
    estimate(model, [batch])
    both = torch.cat([batch, batch + 4]).double()
    torch.testing.assert_close(model.norm.running_var.double(), both.var((0, 2, 3)), rtol=1e-6, atol=0)
