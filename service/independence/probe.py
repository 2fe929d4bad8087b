"""Measures whether kernels round alike: one image's logits, as bits, whatever shares its run. Knows no model file.

A *shape* is a way to run: so many images together on so many threads. Each shape is first held against itself (every
slot, hostile neighbours, fill levels, repetition), then all together run concurrently in random order from threads
that never ran before, and shapes whose bits agree form a class. Only measurement on this very device can show this;
`notes` in the certificate say what was cut to stay in time.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from service.engine import Shape
from service.independence.fingerprint import flushes_subnormals
from service.independence.probe_images import SEED, Pixels, hostile_neighbours, probe_images

Logits = NDArray[np.float32]
Run = Callable[[Pixels, int], Logits]  # images (batch_size, …) and threads → logits
Report = Callable[[str, float], None]  # what is being done, and the share that is done, 0 to 1

EVERY = 10**6  # more slots than a batch has
MOST_IMAGES = 256  # no failure among 256 independent images bounds a failing share of 5 % with 1 − 2·10⁻⁶


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is tried, in about `budget_s` seconds: `images` and `repeats` are wishes that it may cut."""

    budget_s: float
    images: int
    slots: int  # at most so many of a shape's slots
    fills: int  # kinds of hostile neighbours
    targets: int  # images that meet them
    repeats: int
    concurrent_runs: int


FULL = Effort(budget_s=60.0, images=MOST_IMAGES, slots=EVERY, fills=5, targets=4, repeats=50, concurrent_runs=200)
QUICK = Effort(budget_s=2.0, images=8, slots=2, fills=1, targets=1, repeats=1, concurrent_runs=6)


@dataclass(frozen=True, slots=True)
class Findings:
    """What a probe saw. `classes` are groups of shapes with equal bits; `unsound` shapes differ from themselves."""

    images: int
    comparisons: int
    classes: tuple[tuple[Shape, ...], ...]
    digests: dict[Shape, str]
    unsound: dict[Shape, str]
    costs_s: dict[Shape, float]
    cut: tuple[str, ...]


@dataclass(slots=True)
class _Bench:
    """The state of one probe."""

    run: Run
    images: Pixels
    baseline: dict[Shape, Logits] = field(default_factory=dict)
    unsound: dict[Shape, str] = field(default_factory=dict)
    comparisons: int = 0

    def differs(self, shape: Shape, batch: Pixels, slots: Sequence[int], indices: Sequence[int]) -> bool:
        """Run a batch; True when the image at some slot has other bits than the baseline of its index."""
        seen = self.run(batch, shape.threads)[list(slots)]
        self.comparisons += len(slots)
        return not same_bits(seen, self.baseline[shape][list(indices)])


def probe(
    run: Run,
    shapes: Sequence[Shape],
    real: Pixels,
    effort: Effort,
    report: Report = lambda *_: None,
    costs_s: Mapping[Shape, float] | None = None,
) -> Findings:
    """Probe `shapes`; `real` are images of the model's own kind, uint8 (n, height, width, channels).

    `costs_s` is what a run of each shape takes, in seconds, where that is known; else it is measured.
    """
    costs = {shape: _cost_s(run, shape, real) for shape in shapes} if costs_s is None else dict(costs_s)
    effort, cut = _affordable(costs, effort)
    bench = _Bench(run, probe_images(effort.images, real.shape[1:], real))
    checks: tuple[tuple[str, Callable[[_Bench, Shape, Effort], bool]], ...] = (
        ("slot", _slots_differ),
        ("neighbours", _neighbours_differ),
        ("fill level", _fill_levels_differ),
        ("repetition", _repeats_differ),
    )
    for index, shape in enumerate(shapes):
        report(
            f"batch {shape.batch_size} on {shape.threads} thread{'s' * (shape.threads > 1)}", 0.95 * index / len(shapes)
        )
        bench.baseline[shape] = _in_batches(bench.run, shape, bench.images, rotation=0)
        reason = next((name for name, differ in checks if differ(bench, shape, effort)), None)
        if reason is not None:
            bench.unsound[shape] = f"an image's bits change with its {reason}"
    report("all at once, from new threads", 0.95)
    _run_concurrently(bench, effort)
    digests = {shape: digest_of(bench.baseline[shape]) for shape in shapes if shape not in bench.unsound}
    return Findings(effort.images, bench.comparisons, _classes(digests), digests, bench.unsound, costs, cut)


def same_bits(first: Logits, second: Logits) -> bool:
    """True when two arrays are equal as bits: −0 is not 0, and a NaN equals itself."""
    return np.array_equal(np.ascontiguousarray(first).view(np.uint32), np.ascontiguousarray(second).view(np.uint32))


def digest_of(logits: Logits) -> str:
    """Return the sha256 of logits as little-endian float32, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(logits, "<f4").tobytes()).hexdigest()


def fill(images: Pixels, batch_size: int) -> Pixels:
    """Return `images` followed by black ones up to `batch_size`: the one filler that is ever used."""
    if len(images) == batch_size:
        return images
    return np.concatenate([images, np.zeros((batch_size - len(images), *images.shape[1:]), np.uint8)])


def _cost_s(run: Run, shape: Shape, real: Pixels) -> float:
    """Return the least time of a run of this shape, after one that warms it up: what is above it is other people's."""
    batch = np.resize(real, (shape.batch_size, *real.shape[1:]))
    run(batch, shape.threads)
    times: list[float] = []
    while len(times) < 3 or (len(times) < 9 and sum(times) < 0.05):
        started = time.perf_counter()
        run(batch, shape.threads)
        times.append(time.perf_counter() - started)
    return min(times)


def _affordable(costs: dict[Shape, float], effort: Effort) -> tuple[Effort, tuple[str, ...]]:
    """Return the effort that the budget allows, and what was cut.

    A third of the budget is for repetition and hostile neighbours, the rest for images in slots, of which there are at
    least as many as the largest batch holds.
    """
    largest = max(shape.batch_size for shape in costs)
    wanted = max(largest, effort.images)
    once = sum(costs.values())
    a_pass = sum(cost * min(shape.batch_size, effort.slots) / shape.batch_size for shape, cost in costs.items())
    repeats = max(1, min(effort.repeats, int(effort.budget_s / 6 / once)))
    meetings = sum(cost * _meetings(shape, effort) for shape, cost in costs.items())
    targets = max(1, min(effort.targets, int(effort.budget_s / 6 / meetings))) if meetings else 1
    images = max(largest, min(wanted, int(effort.budget_s * 2 / 3 / a_pass) // largest * largest))
    cut = [
        f"{got} {what} instead of {wish}, to end in about {effort.budget_s:g} s"
        for what, got, wish in (
            ("images", images, wanted),
            ("repetitions", repeats, effort.repeats),
            ("images among hostile neighbours", targets, effort.targets),
        )
        if got < wish
    ]
    return replace(effort, images=images, repeats=repeats, targets=targets), tuple(cut)


def _meetings(shape: Shape, effort: Effort) -> int:
    """Return how many runs one image's meetings with hostile neighbours take."""
    return effort.fills * len(_edge_slots(shape, effort)) if shape.batch_size > 1 else 0


def _edge_slots(shape: Shape, effort: Effort) -> list[int]:
    """Return the slots where kernels change their ways: the ends, their neighbours, the middle."""
    size = shape.batch_size
    return [slot for slot in dict.fromkeys((0, size - 1, size // 2, 1, size - 2)) if 0 <= slot < size][: effort.slots]


def _in_batches(run: Run, shape: Shape, images: Pixels, *, rotation: int) -> Logits:
    """Return the logits of all images in their own order, each having sat `rotation` slots further on."""
    turned = np.roll(images, rotation, axis=0)
    size = shape.batch_size
    logits = [run(fill(turned[at : at + size], size), shape.threads) for at in range(0, len(turned), size)]
    return np.roll(np.concatenate(logits)[: len(images)], -rotation, axis=0)


def _slots_differ(bench: _Bench, shape: Shape, effort: Effort) -> bool:
    tried = np.linspace(0, shape.batch_size, min(shape.batch_size, effort.slots), endpoint=False).astype(int).tolist()
    for rotation in tried[1:]:
        bench.comparisons += len(bench.images)
        if not same_bits(_in_batches(bench.run, shape, bench.images, rotation=rotation), bench.baseline[shape]):
            return True
    return False


def _neighbours_differ(bench: _Bench, shape: Shape, effort: Effort) -> bool:
    for target in range(effort.targets if shape.batch_size > 1 else 0):
        fills = list(hostile_neighbours(shape.batch_size, bench.images[target]).values())
        for neighbours in fills[-effort.fills :]:
            for slot in _edge_slots(shape, effort):
                batch = neighbours.copy()
                batch[slot] = bench.images[target]
                if bench.differs(shape, batch, [slot], [target]):
                    return True
    return False


def _fill_levels_differ(bench: _Bench, shape: Shape, effort: Effort) -> bool:
    levels = range(1, shape.batch_size)[:: max(1, shape.batch_size // effort.slots)]
    filled = ((level, fill(bench.images[:level], shape.batch_size)) for level in levels)
    return any(bench.differs(shape, batch, range(level), range(level)) for level, batch in filled)


def _repeats_differ(bench: _Bench, shape: Shape, effort: Effort) -> bool:
    batch, slots = bench.images[: shape.batch_size], range(shape.batch_size)
    return any(bench.differs(shape, batch, slots, slots) for _ in range(effort.repeats))


def _run_concurrently(bench: _Bench, effort: Effort) -> None:
    """Run sound shapes at random from as many new threads as there are shapes, and note those whose bits change."""
    shapes = [shape for shape in bench.baseline if shape not in bench.unsound]
    lock = threading.Lock()
    shares = [effort.concurrent_runs // max(1, len(shapes)) + 1] * max(2, len(shapes))
    stop_at = time.monotonic() + effort.budget_s / 4

    def work(seed: int, runs: int) -> None:
        if flushes_subnormals():
            bench.unsound.update(dict.fromkeys(shapes, "a new thread turns subnormal numbers into 0"))
        generator = np.random.default_rng(SEED + seed)
        for shape, start in _random_runs(generator, shapes, len(bench.images), runs):
            if time.monotonic() > stop_at:
                return
            indices = [(start + slot) % len(bench.images) for slot in range(shape.batch_size)]
            if bench.differs(shape, bench.images[indices], range(shape.batch_size), indices):
                with lock:
                    bench.unsound[shape] = "an image's bits change under concurrent runs"

    threads = [threading.Thread(target=work, args=(seed, runs)) for seed, runs in enumerate(shares) if shapes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _random_runs(
    generator: np.random.Generator, shapes: Sequence[Shape], images: int, runs: int
) -> Iterator[tuple[Shape, int]]:
    for _ in range(runs):
        yield shapes[int(generator.integers(len(shapes)))], int(generator.integers(images))


def _classes(digests: dict[Shape, str]) -> tuple[tuple[Shape, ...], ...]:
    groups: dict[str, list[Shape]] = {}
    for shape in sorted(digests):
        groups.setdefault(digests[shape], []).append(shape)
    return tuple(tuple(group) for group in groups.values())
