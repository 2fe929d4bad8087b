"""Measures whether kernels round alike: one image's logits, as bits, whatever shares its run. Knows no model file.

A *shape* is a way to run: so many images together on so many threads. Each shape is first held against itself (every
slot, hostile neighbours, fill levels, repetition), those of one thread side by side; then all together run concurrently
in random order from threads that never ran before, and shapes whose bits agree form a class. Only measurement on this
very device can show this; `cut` in the certificate says what was left out to stay in time.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.engine import Shape
from service.independence.effort import Effort, affordable, divide, edge_slots, fill_levels, slots_tried
from service.independence.fingerprint import flushes_subnormals
from service.independence.probe_images import SEED, Pixels, hostile_neighbours, probe_images
from service.independence.timing import costs_of
from service.wording import counted

Logits = NDArray[np.float32]
Run = Callable[[Pixels, int], Logits]  # images (batch_size, …) and threads → logits
Report = Callable[[str, float], None]  # what is being done, and the share that is done, 0 to 1


@dataclass(frozen=True, slots=True)
class Findings:
    """What a probe saw. `classes` are groups of shapes with equal bits; `unsound` shapes differ from themselves."""

    images: int
    comparisons: int
    classes: tuple[tuple[Shape, ...], ...]
    digests: dict[Shape, str]
    unsound: dict[Shape, str]
    costs_s: dict[Shape, float]
    doubtful: frozenset[Shape]  # whose cost was never measured without a neighbour's work
    cut: tuple[str, ...]


@dataclass(slots=True)
class _Bench:
    """The state of one probe."""

    engine_run: Run
    images: Pixels
    baseline: dict[Shape, Logits] = field(default_factory=dict)
    unsound: dict[Shape, str] = field(default_factory=dict)
    comparisons: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)  # several shapes are probed at once
    failure: BaseException | None = None  # what ended one lane, and with it all others

    def run(self, images: Pixels, threads: int) -> Logits:
        """Run a batch, unless the probe has ended."""
        if self.failure is not None:
            raise self.failure
        return self.engine_run(images, threads)

    def differs(self, shape: Shape, batch: Pixels, slots: Sequence[int], indices: Sequence[int]) -> bool:
        """Run a batch; True when the image at some slot has other bits than the baseline of its index."""
        seen = self.run(batch, shape.threads)[list(slots)]
        self.count(len(slots))
        return not same_bits(seen, self.baseline[shape][list(indices)])

    def count(self, answers: int) -> None:
        """Count answers that were compared."""
        with self.lock:
            self.comparisons += answers


def probe(
    run: Run,
    shapes: Sequence[Shape],
    real: Pixels,
    effort: Effort,
    report: Report = lambda *_: None,
    costs_s: Mapping[Shape, float] | None = None,
    lanes: int = 1,
) -> Findings:
    """Probe `shapes`; `real` are images of the model's own kind, uint8 (n, height, width, channels).

    `costs_s` is what a run of each shape takes, in seconds, where that is known; else it is measured. So many shapes of
    one thread are probed at once as there are `lanes`. What `report` raises ends the probe.
    """
    started = time.monotonic()
    timed = costs_of(run, shapes, real) if costs_s is None else {}
    costs = {shape: cost.seconds for shape, cost in timed.items()} if costs_s is None else dict(costs_s)
    doubtful = frozenset(shape for shape, cost in timed.items() if not cost.is_calm)
    effort, cut = affordable(costs, effort, lanes, spent_s=time.monotonic() - started)
    bench = _Bench(run, probe_images(effort.images, real.shape[1:], real))
    _probe_each(bench, costs, effort, lanes, report)
    report("all at once, from new threads", 0.95)
    _run_concurrently(bench, effort)
    digests = {shape: digest_of(bench.baseline[shape]) for shape in shapes if shape not in bench.unsound}
    return Findings(effort.images, bench.comparisons, _classes(digests), digests, bench.unsound, costs, doubtful, cut)


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


def _probe_each(bench: _Bench, costs: Mapping[Shape, float], effort: Effort, lanes: int, report: Report) -> None:
    """Hold every shape against itself: those of one thread side by side, then the others one by one."""
    begun: list[Shape] = []

    def begin(shape: Shape) -> None:
        with bench.lock:
            report(f"batch {shape.batch_size} on {counted(shape.threads, 'thread')}", 0.95 * len(begun) / len(costs))
            begun.append(shape)

    def work(share: Sequence[Shape]) -> None:
        try:
            for shape in share:
                begin(shape)
                _probe_one(bench, shape, effort)
        except BaseException as error:
            bench.failure = bench.failure or error
            raise

    shares = divide([shape for shape in costs if shape.threads == 1], costs, effort, lanes)
    with ThreadPoolExecutor(max(1, lanes - 1), thread_name_prefix="probe") as pool:
        others = [pool.submit(work, share) for share in shares[1:]]
        work(shares[0])  # in the caller's thread, whose bits are held against those of new threads later on
        for other in others:
            other.result()
    work([shape for shape in costs if shape.threads > 1])


def _probe_one(bench: _Bench, shape: Shape, effort: Effort) -> None:
    checks: tuple[tuple[str, Callable[[_Bench, Shape, Effort], bool]], ...] = (
        ("slot", _slots_differ),
        ("neighbours", _neighbours_differ),
        ("fill level", _fill_levels_differ),
        ("repetition", _repeats_differ),
    )
    bench.baseline[shape] = _in_batches(bench.run, shape, bench.images, rotation=0)
    reason = next((name for name, differ in checks if differ(bench, shape, effort)), None)
    if reason is not None:
        bench.unsound[shape] = f"an image's bits change with its {reason}"


def _in_batches(run: Run, shape: Shape, images: Pixels, *, rotation: int) -> Logits:
    """Return the logits of all images in their own order, each having sat `rotation` slots further on."""
    turned = np.roll(images, rotation, axis=0)
    size = shape.batch_size
    logits = [run(fill(turned[at : at + size], size), shape.threads) for at in range(0, len(turned), size)]
    return np.roll(np.concatenate(logits)[: len(images)], -rotation, axis=0)


def _slots_differ(bench: _Bench, shape: Shape, effort: Effort) -> bool:
    for rotation in slots_tried(shape, effort)[1:]:
        bench.count(len(bench.images))
        if not same_bits(_in_batches(bench.run, shape, bench.images, rotation=rotation), bench.baseline[shape]):
            return True
    return False


def _neighbours_differ(bench: _Bench, shape: Shape, effort: Effort) -> bool:
    for target in range(effort.targets if shape.batch_size > 1 else 0):
        fills = list(hostile_neighbours(shape.batch_size, bench.images[target]).values())
        for neighbours in fills[-effort.fills :]:
            for slot in edge_slots(shape, effort):
                batch = neighbours.copy()
                batch[slot] = bench.images[target]
                if bench.differs(shape, batch, [slot], [target]):
                    return True
    return False


def _fill_levels_differ(bench: _Bench, shape: Shape, effort: Effort) -> bool:
    levels = fill_levels(shape, effort)
    filled = ((level, fill(bench.images[:level], shape.batch_size)) for level in levels)
    return any(bench.differs(shape, batch, range(level), range(level)) for level, batch in filled)


def _repeats_differ(bench: _Bench, shape: Shape, effort: Effort) -> bool:
    batch, slots = bench.images[: shape.batch_size], range(shape.batch_size)
    return any(bench.differs(shape, batch, slots, slots) for _ in range(effort.repeats))


def _run_concurrently(bench: _Bench, effort: Effort) -> None:
    """Run sound shapes at random from as many new threads as there are shapes, and note those whose bits change."""
    shapes = [shape for shape in bench.baseline if shape not in bench.unsound]
    count = max(2, len(shapes))

    def work(seed: int) -> None:
        if flushes_subnormals():
            bench.unsound.update(dict.fromkeys(shapes, "a new thread turns subnormal numbers into 0"))
        runs = len(range(seed, effort.concurrent_runs, count))
        for shape, start in _random_runs(np.random.default_rng(SEED + seed), shapes, len(bench.images), runs):
            indices = [(start + slot) % len(bench.images) for slot in range(shape.batch_size)]
            if bench.differs(shape, bench.images[indices], range(shape.batch_size), indices):
                with bench.lock:
                    bench.unsound[shape] = "an image's bits change under concurrent runs"

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(count) if shapes]
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
