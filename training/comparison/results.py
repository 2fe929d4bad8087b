"""Trials on the disk, so that a comparison that was stopped goes on, and what they say together."""

import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from training.checkpoint import write_atomically
from training.comparison.experiments import Scale
from training.comparison.trial import Look, Trial
from training.config import TrainConfig
from training.errors import RunError

TARGETS = (0.98, 0.99)


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample deviation over seeds; `reached` of `seeds` got there, and only they are in the mean."""

    mean: float | None
    deviation: float | None
    reached: int
    seeds: int

    def words(self, template: str = "{:,.0f}") -> str:
        """Return `mean ± deviation`, with how many seeds got there where not all did."""
        if self.mean is None:
            return "not reached"
        text = template.format(self.mean)
        if self.deviation is not None:
            text += f" ± {template.format(self.deviation)}"
        return text if self.reached == self.seeds else f"{text} ({self.reached} of {self.seeds})"


def trial_path(folder: Path, variant: str, config: TrainConfig, scale: Scale, data: str) -> Path:
    """Return where a trial on data of this digest is kept; the name changes with all that could change its result."""
    parts = {
        **asdict(config),
        "data": data,
        "images": scale.images,
        "evaluations": scale.evaluations,
        "test": scale.test_images,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
    return folder / "trials" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', variant)}-seed{config.seed}-{digest}.json"


def keep_trial(path: Path, trial: Trial, config: TrainConfig) -> None:
    """Write a trial, whole or not at all. Raises RunError when the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path.parent} cannot be made: {error.strerror}") from None
    content = {**asdict(trial), "config": asdict(config)}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def kept_trial(path: Path) -> Trial | None:
    """Return a trial that was kept, None where there is none. Raises RunError naming a damaged file."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        looks = tuple(Look(**look) for look in content["looks"])
        return Trial(content["variant"], content["seed"], content["steps"], looks, content["diverged"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it, and it is run again") from None


def steps_to(target: float, trials: Sequence[Trial]) -> Spread:
    """Return the steps until a look first saw `target` on the test images."""
    return _spread([look.step for look in _first(target, trials)], len(trials))


def seconds_to(target: float, trials: Sequence[Trial]) -> Spread:
    """Return the seconds of training, evaluation left out, until then."""
    return _spread([look.seconds for look in _first(target, trials)], len(trials))


def final_accuracy(trials: Sequence[Trial], *, corrected: bool = False) -> Spread:
    """Return the accuracy at the end."""
    values = [trial.final.corrected if corrected else trial.final.accuracy for trial in trials]
    return _spread(values, len(trials))


def final_accuracy_of(domain: str, trials: Sequence[Trial]) -> Spread:
    """Return the accuracy at the end on one domain's test images."""
    return _spread([trial.final.domains[domain] for trial in trials], len(trials))


def domain_names(trials: Mapping[str, Sequence[Trial]]) -> list[str]:
    """Return the domains that the trials were looked at apart in; none where there is one alone."""
    return list(next((trial.final.domains for same in trials.values() for trial in same), {}))


def _first(target: float, trials: Sequence[Trial]) -> list[Look]:
    found = (next((look for look in trial.looks if look.accuracy >= target), None) for trial in trials)
    return [look for look in found if look is not None]


def _spread(values: Sequence[float], seeds: int) -> Spread:
    if not values:
        return Spread(None, None, 0, seeds)
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values), seeds)
