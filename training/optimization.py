"""From gradients to weights: optimizers, penalties, learning-rate schedules. Knows no data and no network's shape.

A schedule is a function of the step's number alone, so that a resumed run takes the rates that a whole one would.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.config import TrainConfig

ONE_CYCLE_FINAL = 1e-4  # of the starting rate, as in torch.optim.lr_scheduler.OneCycleLR
START = 1 / 25  # of the peak: where the warm-ups begin
DECOUPLED = "decoupled_decay"


def build_optimizer(config: TrainConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Return the configured optimizer. Weight decay spares biases and a normalization's γ and β: they are vectors.

    `sgd` has Nesterov momentum where `momentum` is above 0; `adamw` takes `momentum` for β₁; `adagrad` starts its
    accumulator at `accumulator`, 0.1 in TensorFlow and 0 in torch, and adds no epsilon where that keeps it above 0,
    as `tf.train.AdagradOptimizer` does.
    """
    weights, vectors = _split(network)
    is_separate = config.decoupled and config.optimizer != "adamw"  # torch's AdamW does it itself
    decay = 0.0 if is_separate else config.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": decay, DECOUPLED: config.weight_decay if is_separate else 0.0},
        {"params": vectors, "weight_decay": 0.0, DECOUPLED: 0.0},
    ]
    optimizer = _of_kind(config, groups)
    if is_separate:
        optimizer.register_step_pre_hook(_decay_weights)
    return optimizer


def penalty(config: TrainConfig, network: nn.Module) -> Tensor | float:
    """Return l1 · Σ|w| + l2 · Σw²/2 over weights, never over biases, γ and β; ½ is TensorFlow's and cancels with 2w."""
    if config.l1 == config.l2 == 0:
        return 0.0
    weights, _ = _split(network)
    return sum(config.l1 * weight.abs().sum() + config.l2 / 2 * weight.square().sum() for weight in weights)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate of every step of a run, put into an optimizer."""

    config: TrainConfig
    optimizer: torch.optim.Optimizer
    steps: int  # of the whole run

    def apply(self, step: int) -> float:
        """Set and return the rate of `step`, counted from 0."""
        rate = learning_rate(self.config, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Schedule:
    """Return the configured schedule over all epochs."""
    return Schedule(config, optimizer, config.epochs * steps_per_epoch)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the rate of `step` of `steps`, counted from 0.

    linear       from a 25th of the peak up to it over `warmup_share`, then down to 0, both in a line
    cosine       the same warm-up, then half a cosine down to 0 (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5)
    one_cycle    up and down in half cosines, down to a 10,000th of the start: torch's OneCycleLR (arXiv 1708.07120)
    exponential  peak · decay_rate^⌊step / decay_steps⌋: TensorFlow's staircase
    constant     the peak
    """
    progress = step / steps
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "exponential":
        return float(config.learning_rate * config.decay_rate ** (step // config.decay_steps))
    if config.schedule == "one_cycle":
        return config.learning_rate * _one_cycle(step, steps, config.warmup_share)
    if progress < config.warmup_share:
        return config.learning_rate * (1 + 24 * progress / config.warmup_share) / 25
    if config.schedule == "cosine":
        left = (progress - config.warmup_share) / (1 - config.warmup_share)
        return config.learning_rate * (1 + math.cos(math.pi * left)) / 2
    return config.learning_rate * (1 - progress) / (1 - config.warmup_share)


def _one_cycle(step: int, steps: int, share: float) -> float:
    peak, last = share * steps - 1, steps - 1  # torch counts so: the peak is the last step of the climb
    if step <= peak:
        return _half_cosine(START, 1.0, step / peak if peak else 1.0)
    return _half_cosine(1.0, START * ONE_CYCLE_FINAL, min(1.0, (step - peak) / (last - peak)))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _split(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the weights of convolutions and linear layers, then everything that is a vector."""
    parameters = list(network.parameters())
    return [one for one in parameters if one.ndim > 1], [one for one in parameters if one.ndim <= 1]


def _of_kind(config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    # One kernel for all weights; elsewhere torch's own choice. In float16 a step may be skipped, which a fused one
    # decides by itself, after `_decay_weights`.
    is_on_cuda = all(one.device.type == "cuda" for group in groups for one in group["params"])
    is_fused = True if is_on_cuda and config.precision != "float16" else None
    if config.optimizer == "adamw":
        betas = (config.momentum, config.beta2)
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=is_fused)
    if config.optimizer == "adagrad":
        eps = 0.0 if config.accumulator > 0 else 1e-10
        return torch.optim.Adagrad(
            groups, lr=config.learning_rate, initial_accumulator_value=config.accumulator, eps=eps
        )
    return torch.optim.SGD(
        groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0, fused=is_fused
    )


@torch.no_grad()
def _decay_weights(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if weights and group[DECOUPLED]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group[DECOUPLED])
