"""One variant with one seed: trained for a number of steps by the ordinary loop, looked at in between."""

import math
from dataclasses import dataclass, field, replace
from itertools import count
from statistics import fmean
from time import perf_counter

import torch

from training.batches import Batches, epoch_steps
from training.comparison.experiments import Scale
from training.config import TrainConfig
from training.data import Dataset, Split, concatenated, limited
from training.errors import Diverged
from training.fitting import score_domains
from training.learner import Learner
from training.loop import Progress, Tally, choose_device, continue_epoch, evaluate, warm_up
from training.normalization import batch_norms, initial_share
from training.normalization.running import correction
from training.run import prepare


@dataclass(frozen=True, slots=True)
class Look:
    """The test accuracy, 0 to 1, after a step; `corrected` is without the running statistics' start; seconds train.

    Of several domains it is the mean of theirs, which `domains` holds by name: the larger counts no more.
    """

    step: int
    seconds: float
    accuracy: float
    corrected: float
    domains: dict[str, float] = field(default_factory=dict)


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
    """Train one variant from scratch on `scale.images` images and look at the test set now and again.

    Raises UsageError, DataError, or RunError where the network cannot be trained at all.
    """
    learner, training, _ = prepare(config, dataset, choose_device(config.device))
    test = Batches.on(learner.device, _test_part(dataset, scale.test_images))
    steps = math.ceil(scale.images / config.batch_size)
    learner.config = replace(config, epochs=math.ceil(steps / epoch_steps(training, config)))  # schedules end with it
    warm_up(learner, training, lambda _: None)
    watch = _Watch(learner, test, dataset.domains, steps, scale.evaluations)
    diverged = _train(learner, training, watch)
    return Trial(variant, config.seed, watch.step, tuple(watch.looks), diverged)


def _test_part(dataset: Dataset, most: int) -> Split:
    """Return at most so many test images, stratified; of several domains, so many of each."""
    if not dataset.domains:
        return limited(dataset.test, most, seed=0)
    return concatenated([limited(dataset.of_domain(name).test, most, seed=0) for name in dataset.domains])


def _train(learner: Learner, training: Batches, watch: "_Watch") -> bool:
    watch.start()
    try:
        for epoch in count(1):
            continue_epoch(learner, training, epoch, Tally(), watch)
    except _EnoughSteps:
        return False
    except Diverged:
        watch.look()
    return True


class _Watch:
    """Counts steps, looks where it is due, and keeps the clock of training alone."""

    def __init__(self, learner: Learner, test: Batches, domains: tuple[str, ...], steps: int, evaluations: int) -> None:
        self.looks: list[Look] = []
        self.step = 0
        self._learner, self._model, self._test, self._domains = learner, learner.model, test, domains
        self._steps = steps
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
        scores = self._scores()
        with correction(self._model, is_on=True):
            corrected = self._scores() if self._is_warming() else scores
        self._model.train(was_training)
        domains, seconds = dict(zip(self._domains, scores, strict=False)), round(self._seconds, 3)
        self.looks.append(Look(self.step, seconds, fmean(scores), fmean(corrected), domains))
        self._since = perf_counter()

    def _scores(self) -> list[float]:
        """Return the accuracy on each domain, or the one there is."""
        if not self._domains:
            return [evaluate(self._model, self._test).accuracy]
        found = score_domains(self._model, self._learner.network, self._test, self._domains)
        return [score.accuracy for score in found]

    def _is_warming(self) -> bool:
        """True while more than a float32's rounding of the initial statistics is left anywhere."""
        return any(
            initial_share(norm.momentum or 0.0, int(norm.num_batches_tracked or 0)) > torch.finfo(torch.float32).eps
            for _, norm in batch_norms(self._model)
        )
