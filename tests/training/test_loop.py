"""`training.loop`: steps, learning rates, the optimizer, evaluation."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from training_support import QUICK, train_epoch

from training.architectures import build
from training.config import TrainConfig
from training.data import Split
from training.errors import RunError, UsageError
from training.learner import Learner
from training.loop import (
    Batches,
    Normalize,
    Progress,
    Tally,
    choose_device,
    continue_epoch,
    evaluate,
    steps_per_epoch,
)
from training.normalization import batch_norms
from training.optimization import build_optimizer, learning_rate

PLAIN = replace(QUICK, translate=0.0, epochs=2, batch_size=8)


def numbered(count: int) -> Batches:
    """Images of one pixel that is the image's number, targets its last digit."""
    numbers = torch.arange(count)
    return Batches(numbers.to(torch.uint8).reshape(count, 1, 1, 1), numbers % 10)


class Witness(nn.Module):
    """Keeps what it is shown; its logits are ten trainable numbers."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))
        self.seen: list[list[int]] = []

    def forward(self, images):
        self.seen.append(images.flatten().int().tolist())
        return self.logits.expand(len(images), -1)


def shown(config: TrainConfig, epoch: int, count: int = 30) -> list[list[int]]:
    witness = Witness()
    train_epoch(witness, numbered(count), config, epoch)
    return witness.seen


def test_each_image_is_seen_at_most_once_an_epoch_and_a_last_partial_batch_is_dropped():
    batches = shown(PLAIN, 1)
    assert [len(batch) for batch in batches] == [8, 8, 8]
    flat = [number for batch in batches for number in batch]
    assert len(set(flat)) == 24
    assert set(flat) < set(range(30))


def test_the_order_of_an_epoch_follows_from_seed_and_number_alone():
    first = shown(PLAIN, 1)
    torch.manual_seed(99)
    torch.rand(5)
    assert shown(PLAIN, 1) == first
    assert shown(PLAIN, 2) != first
    assert shown(replace(PLAIN, seed=1), 1) != first


def test_images_keep_their_targets():
    class Echo(Witness):
        """Sure of the right answer, so that a target that has moved shows in the loss."""

        def forward(self, images):
            return nn.functional.one_hot(images.flatten().long() % 10, 10) * 50.0 + 0 * self.logits

    echo = Echo()
    score = train_epoch(echo, numbered(30), PLAIN, 1)
    assert score.accuracy == 1
    assert score.loss < 1e-6


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UsageError, match="batch_size = 31: there are only 30 training images"):
        steps_per_epoch(30, replace(PLAIN, batch_size=31))
    assert steps_per_epoch(30, replace(PLAIN, batch_size=30)) == 1


def test_the_learning_rate_climbs_to_the_peak_and_falls_to_zero():
    config = replace(PLAIN, learning_rate=0.8, warmup_share=0.25)
    rates = [learning_rate(config, step, 1000) for step in range(1001)]
    peak = rates.index(max(rates))
    assert 0 < rates[0] < 0.2, "a start from nothing would waste steps, a start near the peak would not warm up"
    assert (peak, rates[peak]) == (250, pytest.approx(0.8, rel=1e-15))
    assert rates[1000] == pytest.approx(0, abs=1e-16)
    assert all(later > earlier for earlier, later in pairwise(rates[:251]))
    assert all(later < earlier for earlier, later in pairwise(rates[250:]))


def test_without_warm_up_the_rate_starts_at_its_peak():
    assert learning_rate(replace(PLAIN, warmup_share=0.0), 0, 4) == pytest.approx(PLAIN.learning_rate, rel=1e-15)


def test_the_schedule_runs_over_all_epochs_and_not_over_each():
    used = []
    witness = Witness()
    learner = Learner(witness, build_optimizer(PLAIN, witness), PLAIN)
    rates = learner.optimizer.param_groups[0]
    for epoch in (1, 2):
        continue_epoch(learner, numbered(16), epoch, Tally(), lambda _: used.append(rates["lr"]))
    assert used == [learning_rate(PLAIN, step, 4) for step in range(4)]


@pytest.mark.parametrize("name", ["small_cnn", "small_resnet"])
def test_weight_decay_spares_gamma_beta_and_biases(name: str):
    model = build(name, channels=1, classes=10, size=28, bn_momentum=0.1)
    config = replace(PLAIN, weight_decay=0.01)
    decay = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(config, model).param_groups
        for parameter in group["params"]
    }
    for module in model.modules():
        for kind, parameter in module.named_parameters(recurse=False):
            is_weight = kind == "weight" and isinstance(module, nn.Conv2d | nn.Linear)
            assert decay[id(parameter)] == (0.01 if is_weight else 0.0), (module, kind)


def test_a_loss_that_is_not_finite_stops_training_and_names_the_mend():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 10))
    with torch.no_grad():
        model[1].weight.fill_(1e38)
    batches = Batches(torch.ones(16, 1, 1, 1), torch.arange(16) % 10)
    with torch.no_grad():
        model[1].bias[0] = torch.inf
    with pytest.raises(RunError, match=r"not finite in epoch 2; set learning_rate lower than 0\.05"):
        train_epoch(model, batches, PLAIN, 2)


def test_progress_counts_images_and_ends_at_the_score():
    seen: list[Progress] = []
    witness = Witness()
    score = train_epoch(witness, numbered(30), PLAIN, 2, seen.append)
    assert [(progress.epoch, progress.images) for progress in seen] == [(2, 8), (2, 16), (2, 24)]
    assert (seen[-1].loss, seen[-1].accuracy) == (score.loss, score.accuracy)


@pytest.mark.parametrize("count", [1, 999, 1000, 2345], ids=lambda count: f"{count} images")
def test_evaluation_equals_numpy_over_any_number_of_images(count: int):
    rng = np.random.default_rng(count)
    split = Split(rng.integers(0, 256, (count, 3, 4, 2), dtype=np.uint8), rng.integers(0, 5, count))
    torch.manual_seed(0)
    model = nn.Sequential(Normalize((0.5, 0.4), (0.2, 0.3)), nn.Flatten(), nn.Linear(24, 5)).float()
    score = evaluate(model, Batches.on(torch.device("cpu"), split))

    standardised = (split.images / 255 - [0.5, 0.4]) / [0.2, 0.3]
    features = standardised.transpose(0, 3, 1, 2).reshape(count, 24)
    weight, bias = (parameter.detach().double().numpy() for parameter in model[2].parameters())
    logits = features @ weight.T + bias
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(count), split.targets]
    assert score.accuracy == (logits.argmax(1) == split.targets).mean()
    # 24 terms of float32 each, then a float32 sum over at most 1,000 losses in pairs: 40 roundings of 2⁻²⁴ = 2.4e-6
    assert score.loss == pytest.approx(losses.mean(), rel=1e-5)


def test_evaluation_leaves_every_buffer_alone_and_uses_running_statistics():
    model = build("small_cnn", channels=1, classes=10, size=8, bn_momentum=0.1).train()
    model(torch.randn(8, 1, 8, 8))
    before = copy.deepcopy(model.state_dict())
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (50, 8, 8, 1), dtype=np.uint8), rng.integers(0, 10, 50))
    whole = nn.Sequential(Normalize((0.5,), (0.2,)).float(), model)
    together = evaluate(whole, Batches.on(torch.device("cpu"), split))
    alone = [
        evaluate(whole, Batches.on(torch.device("cpu"), split.take(np.array([index])))).loss for index in range(50)
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # batch statistics of one image are another function; float32 rounding is not seen at 1e-4
    assert together.loss == pytest.approx(np.mean(alone), rel=1e-4)


def test_bfloat16_training_keeps_parameters_and_statistics_in_float32():
    config = replace(PLAIN, precision="bfloat16")
    torch.manual_seed(0)
    model = nn.Sequential(
        Normalize((0.5,), (0.2,)), build("small_cnn", channels=1, classes=10, size=8, bn_momentum=0.1)
    )
    model.float()
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
    score = train_epoch(model, Batches(images, torch.arange(16) % 10), config, 1)
    assert math.isfinite(score.loss)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for _, norm in batch_norms(model):
        assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
        assert int(norm.num_batches_tracked) == 2


def test_normalization_of_pixels_equals_numpy_in_float64():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    found = Normalize(mean, std)(images).numpy()
    wanted = (images.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    # some roundings of values below 1 / 0.2, where near the mean they cancel: absolute, 8 · 2⁻⁵³ · 5
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="no CUDA device"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"
