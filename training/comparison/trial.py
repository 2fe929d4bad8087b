"""One variant with one seed: trained for a number of steps by the ordinary loop, looked at in between."""

import math
from dataclasses import dataclass
from itertools import count
from time import perf_counter

import torch
from torch import nn

from training.comparison.experiments import Scale
from training.config import TrainConfig
from training.data import Dataset, hold_out
from training.errors import RunError
from training.loop import Batches, Normalize, Progress, choose_device, evaluate, train_epoch
from training.normalization import batch_norms, initial_share
from training.normalization.running import correction
from training.optimization import build_optimizer
from training.run import build_network, pixel_statistics


@dataclass(frozen=True, slots=True)
class Look:
    """The test accuracy, 0 to 1, after a step; `corrected` is without the running statistics' start; seconds train."""

    step: int
    seconds: float
    accuracy: float
    corrected: float


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of it; `diverged` where the loss was no longer finite and training stopped."""

    variant: str
    seed: int
    steps: int
    looks: tuple[Look, ...]
    diverged: bool

    @property
    def final(self) -> Look:
        """The last look."""
        return self.looks[-1]


class _EnoughSteps(Exception):
    """No error: the loop has no other way out before an epoch ends."""


def run_trial(variant: str, config: TrainConfig, dataset: Dataset, scale: Scale) -> Trial:
    """Train one variant from scratch on `scale.images` images and look at the test set now and again."""
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    pixels = pixel_statistics(dataset, standardise=config.standardise)
    model = nn.Sequential(Normalize(pixels.mean, pixels.std), build_network(config, dataset))
    model.to(device, torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
    test = dataset.test
    if scale.test_images < len(test):
        _, test = hold_out(test, scale.test_images, seed=0)
    watch = _Watch(model, Batches.on(device, test), math.ceil(scale.images / config.batch_size), scale.evaluations)
    diverged = _train(model, Batches.on(device, dataset.training), config, watch)
    return Trial(variant, config.seed, watch.step, tuple(watch.looks), diverged)


def _train(model: nn.Module, training: Batches, config: TrainConfig, watch: "_Watch") -> bool:
    optimizer = build_optimizer(config, model)
    watch.start()
    try:
        for epoch in count(1):
            train_epoch(model, training, optimizer, config, epoch, watch)
    except _EnoughSteps:
        return False
    except RunError:
        watch.look()
    return True


class _Watch:
    """Counts steps, looks where it is due, and keeps the clock of training alone."""

    def __init__(self, model: nn.Module, test: Batches, steps: int, evaluations: int) -> None:
        self.looks: list[Look] = []
        self.step = 0
        self._model, self._test, self._steps = model, test, steps
        self._due = {math.ceil(steps * (one + 1) / evaluations) for one in range(evaluations)}
        self._seconds, self._since = 0.0, 0.0

    def start(self) -> None:
        self._since = perf_counter()

    def __call__(self, _: Progress) -> None:
        self.step += 1
        if self.step in self._due:
            self.look()
        if self.step >= self._steps:
            raise _EnoughSteps

    def look(self) -> None:
        self._seconds += perf_counter() - self._since
        was_training = self._model.training
        accuracy = evaluate(self._model, self._test).accuracy
        with correction(self._model, is_on=True):
            corrected = evaluate(self._model, self._test).accuracy if self._is_warming() else accuracy
        self._model.train(was_training)
        self.looks.append(Look(self.step, round(self._seconds, 3), accuracy, corrected))
        self._since = perf_counter()

    def _is_warming(self) -> bool:
        """True while more than a float32's rounding of the initial statistics is left anywhere."""
        return any(
            initial_share(norm.momentum or 0.0, int(norm.num_batches_tracked or 0)) > torch.finfo(torch.float32).eps
            for _, norm in batch_norms(self._model)
        )
