"""The checks on a layer's numbers alone: statistics, γ, eps, momentum."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from service.wording import counted
from training.doctor.findings import Finding, finding
from training.doctor.norms import Layer, Subject
from training.normalization import initial_share

MOST_INITIAL, SOME_INITIAL = 0.1, 0.01
CANDIDATES = (0.1, 0.01, 0.001)  # PyTorch's default, Keras's and TensorFlow 1's, in PyTorch's sense
LARGEST_SCALE = LARGEST_RATIO = 1e3
DEAD_GAMMA = 1e-8
TF_LIKE, TOO_SLOW = 0.9, 0.001
EPS_RANGE = (1e-7, 1e-2)
NEAR = 0.5  # how far the median channel may be from variance 1 and mean 0 and still count as near


def examine_numbers(subject: Subject) -> Iterator[Finding]:
    """Yield what the numbers of the layers show, one finding for each check, layers gathered."""
    if subject.missing:
        yield finding("statistics-missing", counted(len(subject.missing), "layer"), subject.missing)
    if subject.damaged:
        yield finding("not-finite", f"weights with NaN or Inf in {_some(subject.damaged)}", subject.damaged)
    yield from _each(subject.layers, "not-finite", _not_finite)
    yield from _each(subject.layers, "negative-variance", _negative)
    yield from _each(subject.layers, "never-updated", _never_updated)
    yield from _warmth(subject)
    for check, look in LOOKS.items():
        yield from _each(subject.layers, check, look)


def warmth_note(subject: Subject) -> str | None:
    """Return what can be said of the initial share where the file does not tell it, None where it does."""
    unknown = [layer for layer in subject.layers if share_of(layer) is None]
    counts = [layer.num_batches_tracked for layer in unknown if layer.num_batches_tracked]
    if counts:
        shares = ", ".join(f"{initial_share(momentum, min(counts)):.2g} at {momentum}" for momentum in CANDIDATES)
        fewest = counted(min(counts), "batch")
        return f"momentum unknown (--momentum M tells it): after {fewest} the initial share is {shares}"
    return None if subject.counts_batches else _most_left(unknown)


def _most_left(uncounted: Iterable[Layer]) -> str | None:
    """No variance is below the initial share, so the smallest of a file that counts no batches says how much it may be.

    Layers of one file warm up together.
    """
    smallest = [float(layer.running_var.min()) for layer in uncounted if layer.running_var is not None]
    if not smallest or not MOST_INITIAL < min(smallest) < np.inf:
        return None
    return (
        f"ONNX counts no batches: up to {min(1.0, *smallest):.0%} of the initial statistics may be left, for no "
        "variance is smaller; hold them against images: --data FOLDER"
    )


def _each(layers: Iterable[Layer], check: str, look: Callable[[Layer], str | None]) -> Iterator[Finding]:
    seen = {layer.name: observed for layer in layers if (observed := look(layer))}
    if seen:
        name, observed = next(iter(seen.items()))
        yield finding(check, f"{observed} in {name}" + _more(len(seen)), seen)


def _not_finite(layer: Layer) -> str | None:
    for name in ("running_mean", "running_var", "weight", "bias"):
        values = getattr(layer, name)
        if values is not None and not np.isfinite(values).all():
            return f"{name} is not finite in {_channels(~np.isfinite(values))}"
    return None


def _negative(layer: Layer) -> str | None:
    negative = None if layer.running_var is None else layer.running_var < 0
    return f"running_var is negative in {_channels(negative)}" if negative is not None and negative.any() else None


def _never_updated(layer: Layer) -> str | None:
    if layer.num_batches_tracked == 0:
        return "num_batches_tracked is 0"
    return "mean 0 and variance 1 exactly, in all channels" if _is_initial(layer) else None


def _is_initial(layer: Layer) -> bool:
    mean, var = layer.running_mean, layer.running_var
    return mean is not None and var is not None and bool((mean == 0).all() and (var == 1).all())


def _warmth(subject: Subject) -> Iterator[Finding]:
    """Judge the initial share where it is known; where not, ask whether a usual momentum would explain the numbers."""
    updated = (layer for layer in subject.layers if layer.num_batches_tracked != 0)
    shares = {layer.name: share for layer in updated if (share := share_of(layer)) is not None}
    cold = {name: share for name, share in shares.items() if share > MOST_INITIAL}
    cool = {name: share for name, share in shares.items() if SOME_INITIAL < share <= MOST_INITIAL}
    if cold:
        yield finding("initial-statistics", f"{max(cold.values()):.1%} in the coldest layer", cold)
    if cool:
        yield finding("under-warmed", f"{max(cool.values()):.1%} in the coldest layer", cool)
    yield from _warmth_by_looks([layer for layer in subject.layers if share_of(layer) is None])


def share_of(layer: Layer) -> float | None:
    """Return what is left of a layer's initial statistics, 0 to 1, or None where momentum or count is unknown."""
    if layer.initial_share is not None:
        return layer.initial_share
    if layer.momentum is None or layer.num_batches_tracked is None:
        return None
    return initial_share(layer.momentum, layer.num_batches_tracked)


def _warmth_by_looks(layers: Sequence[Layer]) -> Iterator[Finding]:
    """With an initial share r every variance is at least r, and means and variances lie near 0 and 1.

    A momentum that some layer's numbers contradict is not the file's; one that none contradicts is taken for it.
    """
    usable = [layer for layer in layers if not _not_finite(layer) and not _never_updated(layer)]
    for momentum in CANDIDATES:
        shares = {layer.name: initial_share(momentum, layer.num_batches_tracked or 0) for layer in usable}
        counted = [layer for layer in usable if layer.num_batches_tracked is not None]
        if counted and min(shares.values()) > MOST_INITIAL:
            if all(_fits(layer, shares[layer.name]) for layer in counted):
                observed = f"momentum {momentum} would leave {max(shares.values()):.1%}, and the numbers agree"
                yield finding("initial-statistics", observed, shares)
            return
    uncounted = [layer for layer in usable if layer.num_batches_tracked is None]
    near = [layer for layer in uncounted if _fits(layer, 1 - MOST_INITIAL)]
    if near and all(_allows(layer, 1 - MOST_INITIAL) for layer in uncounted):  # layers of one file warm up together
        observed = "every variance is at least 0.9 and near 1, every mean near 0, and nothing says how often it updated"
        yield finding("initial-statistics", observed, (layer.name for layer in near))


def _fits(layer: Layer, share: float) -> bool:
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        return False
    near = min(NEAR, 3 * (1 - share))
    is_near = np.median(np.abs(var - 1)) <= near and np.median(np.abs(mean)) <= near
    return bool(is_near) and _allows(layer, share)


def _allows(layer: Layer, share: float) -> bool:
    """A variance below the share cannot have it: what was seen only adds to what is left of the initial 1."""
    var = layer.running_var
    return var is None or bool(var.min() >= share * (1 - 1e-4))  # 1e-4: float32 sums of thousands of updates


def _tiny(layer: Layer) -> str | None:
    var, scale = layer.running_var, layer.scale
    if var is None or scale is None:
        return None
    tiny = (var < layer.eps) | (scale > LARGEST_SCALE)
    return f"smallest variance {var.min():.2g}, largest scale {scale.max():.3g}" if tiny.any() else None


def _offset(layer: Layer) -> str | None:
    if layer.running_mean is None or layer.running_var is None or layer.scale is None:
        return None
    ratio = np.abs(layer.running_mean) / np.sqrt(layer.running_var + layer.eps)
    return f"|mean| up to {ratio.max():,.0f} deviations" if ratio.max() > LARGEST_RATIO else None


def _momentum(layer: Layer) -> str | None:
    is_odd = layer.momentum is not None and not TOO_SLOW < layer.momentum < TF_LIKE
    return f"momentum {layer.momentum} in PyTorch's sense" if is_odd else None


def _eps(layer: Layer) -> str | None:
    return None if EPS_RANGE[0] <= layer.eps <= EPS_RANGE[1] else f"eps is {layer.eps:.3g}"


def _dead(layer: Layer) -> str | None:
    dead = None if layer.weight is None else np.abs(layer.weight) < DEAD_GAMMA
    return f"{_share(dead)} channels" if dead is not None and dead.any() else None


def _negative_gamma(layer: Layer) -> str | None:
    negative = None if layer.weight is None else layer.weight < 0
    return f"{_share(negative)} channels" if negative is not None and negative.any() else None


def _half(layer: Layer) -> str | None:
    return f"stored as {layer.stored_as}" if layer.stored_as in ("float16", "bfloat16") else None


LOOKS: dict[str, Callable[[Layer], str | None]] = {
    "tiny-variance": _tiny,
    "offset-heavy": _offset,
    "momentum": _momentum,
    "eps": _eps,
    "half-statistics": _half,
    "dead-channels": _dead,
    "negative-gamma": _negative_gamma,
}


def _share(condition: NDArray[np.bool_]) -> str:
    return f"{int(condition.sum())} of {len(condition)}"


def _channels(condition: NDArray[np.bool_]) -> str:
    return f"{int(condition.sum())} of {len(condition)} channels, the first is {int(np.argmax(condition))},"


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _more(layers: int) -> str:
    return "" if layers == 1 else f", and in {layers - 1} more"
