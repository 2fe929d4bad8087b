"""The checks on how a checkpoint came to be: its counters, frozen layers, averaged weights."""

import re
from collections import Counter
from collections.abc import Iterator

import torch

from service.wording import counted
from training.doctor.checkpoints import Checkpoint, State
from training.doctor.findings import Finding, finding
from training.doctor.norms import Layer, Subject

OF_DOMAIN = re.compile(r"\.domains\.[^.]+$")  # a batch is of one domain, and counts in its BatchNorm alone
BEHIND = 0.9  # of the steps: the first ones may be warm-up, or skipped by a loss scaler


def examine_history(subject: Subject) -> Iterator[Finding]:
    """Yield what the counters show, and what a checkpoint shows besides its layers."""
    yield from _counters(subject)
    frozen = [layer for layer in subject.layers if layer.num_batches_tracked and _is_untrained(layer)]
    if frozen:
        marked = "marked as not trained" if frozen[0].frozen else "γ is 1 and β is 0 exactly, in all channels"
        count = frozen[0].num_batches_tracked or 0
        observed = f"{marked}, after {counted(count, 'batch')}, in {frozen[0].name}"
        yield finding("frozen-affine", observed, (layer.name for layer in frozen))
    if subject.checkpoint is not None:
        yield from _steps(subject, subject.checkpoint)
        yield from _averages(subject.checkpoint)


def _counters(subject: Subject) -> Iterator[Finding]:
    complete = [layer for layer in subject.layers if layer.name not in subject.missing]
    counts = {layer.name: layer.num_batches_tracked for layer in complete}
    if subject.counts_batches and (absent := [name for name, count in counts.items() if count is None]):
        yield finding("counter-missing", counted(len(absent), "layer"), absent)
    tally = Counter(count for count in counts.values() if count)  # 0 is an error of its own
    if len(tally) > 1:
        usual = tally.most_common(1)[0][0]
        odd = {name: count for name, count in counts.items() if count and count != usual}
        name, count = next(iter(odd.items()))
        yield finding("counters-disagree", f"{name} counted {count:,}, most counted {usual:,}", odd)


def _is_untrained(layer: Layer) -> bool:
    weight, bias = layer.weight, layer.bias
    at_start = weight is not None and bias is not None and bool((weight == 1).all() and (bias == 0).all())
    return layer.frozen or at_start


def _steps(subject: Subject, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Steps that accumulate gradients count more batches than steps; none counts fewer, over all domains together."""
    batches: Counter[str] = Counter()
    for layer in subject.layers:
        batches[OF_DOMAIN.sub("", layer.name)] += layer.num_batches_tracked or 0
    most = max(batches.values(), default=0)
    if checkpoint.steps and 0 < most < BEHIND * checkpoint.steps:
        yield finding(
            "counters-behind-steps", f"{counted(most, 'batch')} counted in {counted(checkpoint.steps, 'step')}"
        )


def _averages(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Compare an average with the live network beside it; one that stands alone can only be named."""
    live, average = checkpoint.state, checkpoint.average
    statistics = [name for name in live if name.endswith((".running_mean", ".running_var")) and name in average]
    weights = [name for name in live if live[name].ndim > 1 and name in average]
    if statistics and not _equal(live, average, weights) and _equal(live, average, statistics):
        layers = sorted({name.rpartition(".")[0] for name in statistics})
        yield finding("averaged-weights", f"{checkpoint.key} has averages, and the live network's statistics", layers)
    started = [
        name.rpartition(".")[0] for name in statistics if name.endswith(".running_var") and _initial(average, name)
    ]
    if started:
        yield finding("never-updated", f"mean 0 and variance 1 exactly, in {checkpoint.key}", started)
    if checkpoint.is_average and any(name.endswith(".running_var") for name in live):
        yield finding("averaged-weights", "these weights are an average, and nothing says whose the statistics are")


def _equal(first: State, second: State, names: list[str]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in names)


def _initial(state: State, variance: str) -> bool:
    mean = state.get(variance.removesuffix("var") + "mean")
    return mean is not None and bool((mean == 0).all() and (state[variance] == 1).all())
