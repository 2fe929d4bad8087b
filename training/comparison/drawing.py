"""The pictures of a comparison: curves with their spread over seeds, or final accuracy over what was varied."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from training.comparison.experiments import Experiment, Variant
from training.comparison.results import TARGETS, domain_names
from training.comparison.trial import Trial
from training.pictures import COLOURS, MARKERS, band, figure, legend, panels, png

Trials = Mapping[str, Sequence[Trial]]


def draw_curves(experiment: Experiment, variants: Sequence[Variant], trials: Trials, *, over: str) -> bytes:
    """Return a PNG of test accuracy over `step` or `seconds`, mean and range over seeds; a plot for each domain.

    Errors are on a log scale: there 98 % and 99 % are as far apart as 90 % and 95 %, so both ends of a run can be read.
    """
    domains = domain_names(trials)
    titles = [f"{experiment.title}: {domain}" for domain in domains] or [experiment.title]
    canvas, plots = panels(titles, width=7.0 if len(titles) == 1 else 5.6 * len(titles), height=4.2)
    for axes, domain in zip(plots, domains or [""], strict=True):
        for index, variant in enumerate(variants):
            _curve(axes, variant, trials[variant.name], over, COLOURS[index % len(COLOURS)], domain)
        _error_scale(axes)
        axes.set_xlabel("training steps" if over == "step" else "seconds of training")
    plots[0].set_ylabel("test accuracy")
    legend(plots[-1], entries=len(variants))
    return png(canvas)


def draw_sweep(experiment: Experiment, variants: Sequence[Variant], trials: Trials) -> bytes:
    """Return a PNG of the final test accuracy over what was varied: the mean as a line, each seed as a faint point."""
    canvas, axes = figure(experiment.title)
    lines = _lines(variants, trials)
    for index, (series, points) in enumerate(lines.items()):
        places, accuracies = zip(*points, strict=True)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        means = [fmean(same) for same in accuracies]
        axes.plot(places, means, color=colour, marker=marker, markersize=5, linewidth=2, label=series)
        for place, same in points:
            axes.scatter([place] * len(same), same, color=colour, marker=marker, s=18, alpha=0.35, linewidths=0)
    axes.set_xscale("log")
    axes.set_xticks(sorted({place for points in lines.values() for place, _ in points}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(experiment.axis)
    axes.set_ylabel("test accuracy at the end")
    _error_scale(axes)
    legend(axes, entries=len(lines))
    return png(canvas)


def _lines(variants: Sequence[Variant], trials: Trials) -> dict[str, list[tuple[float, list[float]]]]:
    """Return place and accuracies of each line's points; for decays, what correcting the statistics gives beside it."""
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for variant in variants:
        ends = [trial.final for trial in trials[variant.name]]
        if _is_about_correction(variants):
            lines.setdefault("running statistics as they are", []).append((variant.place, [e.accuracy for e in ends]))
            lines.setdefault("corrected", []).append((variant.place, [end.corrected for end in ends]))
        else:
            lines.setdefault(variant.series, []).append((variant.place, [end.accuracy for end in ends]))
    return lines


def _is_about_correction(variants: Sequence[Variant]) -> bool:
    return all("bn_momentum" in variant.values for variant in variants)


def _curve(axes: Axes, variant: Variant, trials: Sequence[Trial], over: str, colour: str, domain: str) -> None:
    looks = list(zip(*(trial.looks for trial in trials), strict=False))  # to the shortest: one may have diverged
    places = [fmean(getattr(look, over) for look in same) for same in looks]
    accuracies = [[look.domains[domain] if domain else look.accuracy for look in same] for same in looks]
    means = [fmean(same) for same in accuracies]
    axes.plot(places, means, color=colour, linewidth=2, label=variant.series or variant.name)
    band(axes, places, [min(same) for same in accuracies], [max(same) for same in accuracies], colour)
    corrected = [fmean(look.corrected for look in same) for same in looks]
    if not domain and max(abs(one - other) for one, other in zip(corrected, means, strict=True)) > 0.005:
        axes.plot(places, corrected, color=colour, linewidth=1.5, linestyle=":", label="  its statistics corrected")


def _error_scale(axes: Axes) -> None:
    axes.set_yscale("function", functions=(_from_accuracy, _to_accuracy))
    axes.set_ylim(0.05, 0.9965)
    axes.set_yticks([0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.yaxis.set_minor_locator(NullLocator())
    for target in TARGETS:
        axes.axhline(target, color="#888888", linewidth=1, linestyle="--")


def _from_accuracy(accuracy: ArrayLike) -> NDArray[np.float64]:
    error = np.clip(1 - np.asarray(accuracy, dtype=np.float64), 1e-4, math.inf)
    return np.asarray(-np.log10(error))


def _to_accuracy(place: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(1 - np.power(10.0, -np.asarray(place, dtype=np.float64)))
