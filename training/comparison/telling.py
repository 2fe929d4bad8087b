"""Writes a comparison: `comparison.csv`, PNG files, and one HTML page that holds both."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from service.wording import counted
from training.checkpoint import write_atomically
from training.comparison.drawing import draw_curves, draw_sweep
from training.comparison.experiments import Experiment, Scale, Variant
from training.comparison.results import (
    TARGETS,
    domain_names,
    final_accuracy,
    final_accuracy_of,
    seconds_to,
    steps_to,
)
from training.comparison.trial import Trial
from training.page import Picture, Section, Table, build_page


def tell(
    name: str,
    experiment: Experiment,
    variants: Sequence[Variant],
    trials: Mapping[str, Sequence[Trial]],
    scale: Scale,
    folder: Path,
) -> list[Path]:
    """Write table, pictures and page into `folder`; return the files. Raises RunError when the disk refuses."""
    pictures = _pictures(name, experiment, variants, trials)
    table = summary(experiment, variants, trials)
    where = " of each domain" if domain_names(trials) else ""
    lead = (
        f"{experiment.question} Each variant: {counted(scale.seeds, 'seed')}, "
        f"{counted(scale.images, 'training image')} shown, looked at {counted(scale.evaluations, 'time')} on at most "
        f"{counted(scale.test_images, 'test image')}{where}. Mean ± sample deviation over seeds."
    )
    sections = [
        Section(
            "Pictures",
            "Shaded: from the lowest seed to the highest. Faint points: single seeds.",
            [Picture(data, file) for file, data in pictures.items()],
        ),
        Section("Numbers", "Seconds are of training alone, on the machine that ran it.", [table]),
        Section("Held still", "The configuration that all variants share.", [_settings(experiment)]),
    ]
    contents = {
        **pictures,
        "comparison.csv": _csv(trials),
        f"{name}.html": build_page(experiment.title, lead, sections).encode(),
    }
    for file, content in contents.items():
        write_atomically(folder / file, content)
    return [folder / file for file in contents]


def summary(experiment: Experiment, variants: Sequence[Variant], trials: Mapping[str, Sequence[Trial]]) -> Table:
    """Return what came of each variant: final accuracy, and for curves the way to the targets."""
    is_warming = any(one.final.corrected != one.final.accuracy for same in trials.values() for one in same)
    domains = domain_names(trials)
    accuracy = "mean of domains" if domains else "test accuracy"
    head = ["variant", accuracy, *domains] + (["with corrected statistics"] if is_warming else [])
    if experiment.kind == "curves":
        head += [f"{what} to {target:.0%}" for target in TARGETS for what in ("steps", "seconds")]
    rows = [_row(variant.name, trials[variant.name], experiment, is_warming=is_warming) for variant in variants]
    return Table([*head, "diverged"], rows)


def _row(name: str, trials: Sequence[Trial], experiment: Experiment, *, is_warming: bool) -> list[str]:
    row = [name, final_accuracy(trials).words("{:.2%}")]
    row += [final_accuracy_of(domain, trials).words("{:.2%}") for domain in domain_names({name: trials})]
    if is_warming:
        row.append(final_accuracy(trials, corrected=True).words("{:.2%}"))
    if experiment.kind == "curves":
        for target in TARGETS:
            row += [steps_to(target, trials).words(), seconds_to(target, trials).words("{:.1f}")]
    return [*row, str(sum(trial.diverged for trial in trials))]


def _pictures(
    name: str, experiment: Experiment, variants: Sequence[Variant], trials: Mapping[str, Sequence[Trial]]
) -> dict[str, bytes]:
    if experiment.kind == "sweep":
        return {f"{name}.png": draw_sweep(experiment, variants, trials)}
    return {
        f"{name}.png": draw_curves(experiment, variants, trials, over="step"),
        f"{name}-seconds.png": draw_curves(experiment, variants, trials, over="seconds"),
    }


def _settings(experiment: Experiment) -> Table:
    varied = {key for variant in experiment.variants for key in variant.values}
    shared = {key: str(value) for key, value in asdict(experiment.base).items() if key not in varied}
    return Table(["key", "value"], [list(pair) for pair in shared.items()])


def _csv(trials: Mapping[str, Sequence[Trial]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    domains = domain_names(trials)
    writer.writerow(["variant", "seed", "step", "seconds", "accuracy", "corrected", "diverged", *domains])
    for same in trials.values():
        for trial in same:
            for look in trial.looks:
                row = [trial.variant, trial.seed, look.step, look.seconds, look.accuracy, look.corrected]
                writer.writerow([*row, trial.diverged, *(look.domains[domain] for domain in domains)])
    return text.getvalue().encode()
