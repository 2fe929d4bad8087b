"""`training.learner`: a step that is guarded, accumulated, clipped, averaged; what BatchNorm sees of it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from training_support import QUICK, Scattered

from training.architectures import build
from training.batches import Batch
from training.errors import Diverged, RunError
from training.learner import MOST_SKIPPED, Learner
from training.normalization import batch_norms
from training.normalization.running import snapshot
from training.optimization import build_optimizer

PLAIN = replace(QUICK, translate=0.0, batch_size=8, momentum=0.0, weight_decay=0.0)


class Pixels(nn.Module):
    """uint8 → float32."""

    def forward(self, images):
        return images.float() / 255


def learner(config=PLAIN, arithmetic=torch.float32) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(Pixels(), build("small_cnn", channels=1, classes=10, size=8, bn_momentum=0.1))
    optimizer = build_optimizer(config, model)
    model.train()
    return Learner(model, optimizer, config, arithmetic=arithmetic)


def batch(seed: int = 0, count: int = 8, fill: float | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator).float()
    if fill is not None:
        images[3, 0, 2, 2] = fill
    return Batch(images, torch.arange(count) % 10, -1)


@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_never_touches_running_statistics(fill: float):
    one = learner()
    one.step([batch()], 1)
    before = copy.deepcopy(one.model.state_dict())
    with pytest.raises(Diverged, match=r"not finite in epoch 4; set learning_rate lower than 0\.05"):
        one.step([batch(fill=fill)], 4)
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())


def test_without_the_guard_it_would():
    norm = nn.BatchNorm2d(1)
    norm(torch.full((2, 1, 2, 2), torch.nan))
    assert norm.running_mean.isnan().all()


def test_in_float16_such_a_batch_is_skipped_and_training_goes_on_until_there_are_too_many():
    one = learner(arithmetic=torch.float16)
    one.step([batch()], 1)
    before = copy.deepcopy(one.model.state_dict())
    assert one.step([batch(fill=torch.nan)], 1).images == 0
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
    assert one.step([batch()], 1).images == 8
    assert one.skipped == 0
    for _ in range(MOST_SKIPPED - 1):
        one.step([batch(fill=torch.inf)], 3)
    with pytest.raises(Diverged, match=r"20 steps in a row were skipped by epoch 3, .* not finite in float16"):
        one.step([batch(fill=torch.inf)], 3)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_in_float16_a_loss_that_is_not_finite_halves_the_loss_scale_as_such_a_gradient_does(clip_norm: float):
    one = learner(replace(PLAIN, clip_norm=clip_norm), torch.float16)
    one.step([batch()], 1)
    scale = one.scaler.get_scale()
    one.step([batch(fill=torch.nan)], 1)
    assert one.scaler.get_scale() == scale / 2
    one.step([batch()], 1)
    assert one.scaler.get_scale() == scale / 2


def test_a_loss_that_is_not_finite_halves_the_loss_scale_though_its_gradient_is_finite():
    """As of -log 0, whose gradient is softmax less one-hot: the scaler alone would see nothing wrong."""
    one = learner(arithmetic=torch.float16)
    one._judged = one._judge = lambda images, targets: (one.network(images).sum() * 0 + torch.inf, targets.sum() * 0)
    before, scale = copy.deepcopy(one.model.state_dict()), one.scaler.get_scale()
    assert one.step([batch()], 1).images == 0
    assert all(parameter.grad is not None for parameter in one.network.parameters())
    assert one.scaler.get_scale() == scale / 2
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())


def test_in_float16_a_gradient_that_overflows_is_a_skipped_step_too_and_leaves_weights_and_their_average():
    one = learner(replace(PLAIN, weight_ema=0.9), torch.float16)
    one.step([batch()], 1)
    one.restore_loss_scale(
        one.loss_scale() | {"scale": 2.0**120}
    )  # beyond float16 behind the first layer; the loss itself is finite
    weights = [parameter.clone() for parameter in (*one.network.parameters(), *one.average.parameters())]
    assert one.step([batch(1)], 1).images == 8
    assert (one.skipped, one.scaler.get_scale()) == (1, 2.0**119)
    now = (*one.network.parameters(), *one.average.parameters())
    assert all(torch.equal(*pair) for pair in zip(weights, now, strict=True))
    assert int(one.average.n_averaged) == 1
    for _ in range(MOST_SKIPPED - 2):
        one.step([batch(1)], 1)
    with pytest.raises(Diverged, match="20 steps in a row were skipped"):
        one.step([batch(1)], 1)


def test_in_float16_the_loss_scale_is_read_once_a_step_and_skipped_steps_are_told_all_the_same():
    class Counting(torch.amp.GradScaler):
        reads = 0

        def get_scale(self):
            self.reads += 1
            return super().get_scale()

    one = learner(arithmetic=torch.float16)
    one.scaler = Counting("cpu")
    found = [(one.step([batch(fill=fill)], 1).images, one.skipped) for fill in (None, torch.nan, torch.inf, None)]
    assert found == [(8, 0), (0, 1), (0, 2), (8, 0)]
    assert one.scaler.reads == 4


def test_in_float16_a_loss_scale_that_is_taken_up_again_is_not_taken_for_one_that_was_halved():
    stopped, resumed = learner(arithmetic=torch.float16), learner(arithmetic=torch.float16)
    stopped.step([batch(fill=torch.nan)], 1)
    resumed.restore_loss_scale(stopped.loss_scale())
    assert resumed.skipped == 1
    resumed.step([batch()], 1)
    assert (resumed.skipped, resumed.scaler.get_scale()) == (0, 2.0**15)


@pytest.mark.parametrize("arithmetic", [torch.bfloat16, torch.float16])
def test_narrow_arithmetic_keeps_batchnorm_in_float32(arithmetic: torch.dtype):
    """Were the statistics summed in 8 or 11 bits they would be off by more than 2⁻⁹ and 2⁻¹²."""
    one = learner(arithmetic=arithmetic)
    inputs = {}
    for name, norm in batch_norms(one.network):
        norm.register_forward_pre_hook(lambda _, seen, name=name: inputs.update({name: seen[0].detach().double()}))
    one.step([batch()], 1)
    for name, norm in batch_norms(one.network):
        assert norm.running_mean.dtype == norm.weight.dtype == norm.weight.grad.dtype == torch.float32
        mean, variance = inputs[name].mean((0, 2, 3)), inputs[name].var((0, 2, 3))
        torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * variance, rtol=1e-5, atol=1e-7)


def test_accumulated_parts_give_the_gradient_of_their_mean_and_batchnorm_sees_the_parts():
    parts = [batch(1, 4), batch(2, 4)]
    one = learner(replace(PLAIN, accumulate=2))
    twin = copy.deepcopy(one.model)
    one.step(parts, 1)
    loss = sum(nn.functional.cross_entropy(twin(part.images), part.targets) for part in parts) / 2
    loss.backward()
    for mine, theirs in zip(one.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert {int(norm.num_batches_tracked) for _, norm in batch_norms(one.network)} == {2}


def test_the_gradient_is_clipped_to_a_norm():
    free, clipped = learner(), learner(replace(PLAIN, clip_norm=1e-3))
    for one in (free, clipped):
        one.step([batch()], 1)

    def norm(one: Learner) -> float:
        return float(torch.cat([parameter.grad.flatten() for parameter in one.model.parameters()]).norm())

    assert norm(free) > 1e-2
    assert norm(clipped) == pytest.approx(1e-3, rel=1e-3)


def test_the_average_of_weights_follows_its_recursion():
    one = learner(replace(PLAIN, weight_ema=0.75))
    wanted = None
    for step in range(4):
        one.step([batch(step)], 1)
        now = [parameter.detach().double().clone() for parameter in one.network.parameters()]
        wanted = now if wanted is None else [0.75 * a + 0.25 * b for a, b in zip(wanted, now, strict=True)]
    for found, expected in zip(one.average.module.parameters(), wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_no_gradient_and_no_decay_reaches_a_frozen_gamma():
    from training.normalization.running import freeze_affine

    torch.manual_seed(0)
    network = build("small_cnn", channels=1, classes=10, size=8, bn_momentum=0.1)
    freeze_affine(network)
    model = nn.Sequential(Pixels(), network).train()
    config = replace(PLAIN, weight_decay=0.1)
    one = Learner(model, build_optimizer(config, model), config)
    before, moved = [norm.weight.clone() for _, norm in batch_norms(network)], snapshot(network)
    one.step([batch()], 1)
    assert all(torch.equal(norm.weight, kept) for (_, norm), kept in zip(batch_norms(network), before, strict=True))
    assert not torch.equal(snapshot(network)["block1.norm"][0], moved["block1.norm"][0])


@pytest.fixture
def _only_deterministic():
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


@pytest.mark.usefixtures("_only_deterministic")
def test_an_operation_that_is_not_deterministic_is_refused_by_name_with_the_mend():
    model = Scattered()
    config = replace(PLAIN, deterministic=True)
    one = Learner(model, build_optimizer(config, model), config)
    with pytest.raises(RunError, match=r"deterministic = true: put_? .*on this device; .*set deterministic = false"):
        one.step([batch()], 1)
