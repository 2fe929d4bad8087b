"""Leads a comparison: every variant over every seed, what is kept is not run again, then pictures and page."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from service.wording import counted
from training.comparison.experiments import Experiment, Scale, Variant
from training.comparison.results import keep_trial, kept_trial, trial_path
from training.comparison.telling import tell
from training.comparison.trial import Trial, run_trial
from training.config import TrainConfig
from training.data import Dataset, load
from training.trial import DRY_STEPS

DRY_TEST_IMAGES = 100


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run: an experiment with the variants chosen, keys changed for all of them, and how much."""

    name: str
    experiment: Experiment
    variants: tuple[Variant, ...]
    changes: Mapping[str, object]
    scale: Scale

    def config(self, variant: Variant, seed: int) -> TrainConfig:
        """Return the configuration of one trial; what was changed by hand wins over the variant. Raises UsageError."""
        return self.experiment.base.with_values({**variant.values, **self.changes, "seed": seed})


def compare(
    plan: Plan, folder: Path, *, data_dir: Path | None = None, say: Callable[[str], None] = print
) -> list[Path]:
    """Run what is missing, then write CSV, PNG and page into `folder`; return what was written.

    Raises UsageError, DataError or RunError. Stopped at any moment, it goes on with the first trial that is not kept.
    """
    places = _places(plan, folder, data_dir)
    missing = sum(not path.exists() for _, _, path in places)
    say(f"{missing} of {counted(len(places), 'trial')} to run; kept in {folder / 'trials'}")
    trials: dict[str, list[Trial]] = {variant.name: [] for variant in plan.variants}
    data: dict[int, Dataset] = {}
    for number, (variant, config, path) in enumerate(places, start=1):
        trial = kept_trial(path)
        if trial is None:
            if config.seed not in data:  # the validation part is held out by the seed
                data = {config.seed: load(config, data_dir)}
            trial = run_trial(variant.name, config, data[config.seed], plan.scale)
            keep_trial(path, trial, config)
            say(f"{number}/{len(places)}  {_words(trial)}")
        trials[variant.name].append(trial)
    as_run = replace(plan.experiment, base=plan.experiment.base.with_values(plan.changes))
    return tell(plan.name, as_run, plan.variants, trials, plan.scale, folder)


def dry_run(plan: Plan, *, data_dir: Path | None = None, say: Callable[[str], None] = print) -> None:
    """Take two steps of every variant, look once, and say what the comparison would be. Writes nothing.

    Raises as `compare` would.
    """
    configs = [(variant.name, plan.config(variant, seed=0)) for variant in plan.variants]
    dataset = load(configs[0][1], data_dir)
    for name, config in configs:
        run_trial(name, config, dataset, Scale(1, DRY_STEPS * config.batch_size, 1, DRY_TEST_IMAGES))
    steps = sorted(math.ceil(plan.scale.images / config.batch_size) for _, config in configs)
    lengths = ("" if steps[0] == steps[-1] else f"{steps[0]:,} to ") + counted(steps[-1], "step")
    say(
        f"dry run: {DRY_STEPS} steps and a look passed in each of {counted(len(configs), 'variant')}; the comparison "
        f"takes {counted(plan.scale.seeds * len(configs), 'trial')} of {lengths}"
    )


def _places(plan: Plan, folder: Path, data_dir: Path | None) -> list[tuple[Variant, TrainConfig, Path]]:
    """Return every trial with where it is kept; the data are read for it, one seed's at a time."""
    places = []
    for seed in range(plan.scale.seeds):
        configs = [(variant, plan.config(variant, seed)) for variant in plan.variants]
        digest = load(configs[0][1], data_dir).digest(with_test=True)
        places += [
            (variant, config, trial_path(folder, variant.name, config, plan.scale, digest))
            for variant, config in configs
        ]
    return places


def _words(trial: Trial) -> str:
    end = "diverged" if trial.diverged else f"{trial.final.accuracy:.2%}"
    return (
        f"{trial.variant}, seed {trial.seed}: {end} after {counted(trial.steps, 'step')} in {trial.final.seconds:.1f} s"
    )
