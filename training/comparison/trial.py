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
from training.data import Dataset, Split, limited
from training.errors import RunError
from training.learner import Learner
from training.loop import Progress, Tally, choose_device, continue_epoch, evaluate
from training.normalization import batch_norms, initial_share
from training.normalization.domains import active
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
    """Train one variant from scratch on `scale.images` images and look at the test set now and again."""
    learner, training, _ = prepare(config, dataset, choose_device(config.device))
    tests = {name: Batches.on(learner.device, part) for name, part in _test_parts(dataset, scale.test_images).items()}
    steps = math.ceil(scale.images / config.batch_size)
    learner.config = replace(config, epochs=math.ceil(steps / epoch_steps(training, config)))  # schedules end with it
    watch = _Watch(learner, tests, steps, scale.evaluations)
    diverged = _train(learner, training, watch)
    return Trial(variant, config.seed, watch.step, tuple(watch.looks), diverged)


def _test_parts(dataset: Dataset, most: int) -> dict[str, Split]:
    """Return at most so many test images of each domain, stratified; under the set's name where it has no domains."""
    parts = {name: dataset.of_domain(name).test for name in dataset.domains} or {dataset.name: dataset.test}
    return {name: limited(part, most, seed=0) for name, part in parts.items()}


def _train(learner: Learner, training: Batches, watch: "_Watch") -> bool:
    watch.start()
    try:
        for epoch in count(1):
            continue_epoch(learner, training, epoch, Tally(), watch)
    except _EnoughSteps:
        return False
    except RunError:
        watch.look()
    return True


class _Watch:
    """Counts steps, looks where it is due, and keeps the clock of training alone."""

    def __init__(self, learner: Learner, tests: dict[str, Batches], steps: int, evaluations: int) -> None:
        self.looks: list[Look] = []
        self.step = 0
        self._model, self._tests, self._steps = learner.model, tests, steps
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
        domains = scores if len(scores) > 1 else {}
        seconds = round(self._seconds, 3)
        self.looks.append(Look(self.step, seconds, fmean(scores.values()), fmean(corrected.values()), domains))
        self._since = perf_counter()

    def _scores(self) -> dict[str, float]:
        found = {}
        for domain, batches in self._tests.items():
            with active(self._model, domain):
                found[domain] = evaluate(self._model, batches).accuracy
        return found

    def _is_warming(self) -> bool:
        """True while more than a float32's rounding of the initial statistics is left anywhere."""
        return any(
            initial_share(norm.momentum or 0.0, int(norm.num_batches_tracked or 0)) > torch.finfo(torch.float32).eps
            for _, norm in batch_norms(self._model)
        )
