"""The instruments of one model's version: what its batcher, its runner, its decoder and its requests tell of."""

import contextlib
from collections import Counter as Counts
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from service.manifest import Manifest
from service.tallies import Tally

Stage = Literal["read", "decode", "queue", "infer", "encode"]

STAGES: tuple[Stage, ...] = get_args(Stage)
OUTCOMES = {True: "ok", False: "failed"}
HANDED_OVER_EVERY = 256  # requests
GRIDS_HELD = 8  # of as many runs: one by one, a small model would pay more for calls than for sums
SAMPLED_SIDE = 32  # drift looks at a grid of at most about 32 × 32 pixels of an image: a few microseconds


@dataclass(slots=True, eq=False)
class Shelf:
    """Every instrument that has a series for each model, and what is told of all models by now."""

    by_name: dict[str, Any]
    can_forget: bool  # files that several processes share cannot lose a series
    told: Counts[tuple[str, ...]] = field(default_factory=Counts)  # how many opened models say each gauge
    open_models: "set[ModelMetrics]" = field(default_factory=set)


class ModelMetrics:
    """The instruments of one model: an observer for its batcher, its runner and its decoder."""

    def __init__(
        self, shelf: Shelf, name: str, version: int, form: str, digest: str, manifest: Manifest | None = None
    ) -> None:
        self._shelf = shelf
        self._own = (name, str(version))
        shelf.open_models.add(self)
        self._gauges: list[tuple[str, tuple[str, ...]]] = []
        self._depths: list[tuple[Any, Callable[[], int]]] = []
        self._set("model_info", 1, form, digest)
        self._degraded = self._set("degraded", 0)
        self._tallies: list[Tally] = []
        self._batches, self._confidence = self._tally("batch_size"), self._tally("confidence")
        self._rows, self._padding = self._of("executed_rows"), self._of("padding_rows")
        self._shared, self._hits, self._misses = self._of("shared"), self._of("cache_hits"), self._of("cache_misses")
        self._stages = {stage: self._tally("stage_duration_seconds", stage) for stage in STAGES}
        self._dropped = {reason: self._of("dropped", reason) for reason in ("cancelled", "deadline")}
        self._labels = [self._of("predictions", label) for label in manifest.labels] if manifest else []
        self._outcomes: dict[str, Any] = {}
        self._until_handed_over = HANDED_OVER_EVERY
        self._requests = {is_ok: self._tally("request_duration_seconds", OUTCOMES[is_ok]) for is_ok in (True, False)}
        self._drift = _Drift(self, manifest) if manifest is not None and manifest.pixels is not None else None

    def retire(self) -> None:
        """Take back what says that the model is served; what was counted stays, as counters must."""
        self._hand_over()
        self._shelf.open_models.discard(self)
        for name, labels in self._gauges:
            key = (name, *self._own, *labels)
            self._shelf.told[key] -= 1
            if not self._shelf.told[key]:  # a version that was opened anew says the same
                self._of(name, *labels).set(0)
                if self._shelf.can_forget:
                    self._shelf.by_name[name].remove(*self._own, *labels)
        self._gauges.clear()

    def ran(self, size: int, queue_s: Sequence[float], run_s: float) -> None:
        """Record a batch."""
        self._batches.observe(size)
        self._stages["infer"].observe(run_s)
        for seconds in queue_s:
            self._stages["queue"].observe(seconds)
        self._count_down(size)  # a shadow runs, and has no requests

    def executed(self, rows: int, padding: int) -> None:
        """Count the rows of an executed batch, and those of them that only filled it."""
        self._rows.inc(rows)
        if padding:
            self._padding.inc(padding)

    def answered(self, images: NDArray[np.uint8], logits: NDArray[np.float32]) -> None:
        """Record what images (N, height, width, channels) looked like and what they were taken for, logits (N, K)."""
        best = logits.max(axis=1, keepdims=True)
        confidences = 1.0 / np.exp(logits - best).sum(axis=1)
        for index, count in Counts(logits.argmax(axis=1).tolist()).items():
            self._labels[index].inc(count)
        for confidence in confidences.tolist():
            self._confidence.observe(confidence)
        if self._drift is not None:
            self._drift.saw(images)

    def dropped(self, reason: str) -> None:
        """Count an image that was not run because nobody waited any more."""
        self._dropped[reason].inc()

    def shared(self) -> None:
        """Count an image that an identical one's run answers."""
        self._shared.inc()

    def cached(self, is_hit: bool) -> None:  # noqa: FBT001 - a look that found something, or not
        """Count a look into the cache."""
        (self._hits if is_hit else self._misses).inc()

    def certificate(self, verdict: str, digest: str) -> None:
        """Record what the certificate says."""
        self._set("certificate_info", 1, verdict, digest)

    def spot_check(self, verdict: str) -> None:
        """Count a spot check."""
        self._of("spot_checks", verdict).inc()

    def degraded(self) -> None:
        """Record that the model runs at its reference shape only."""
        self._degraded.set(1)

    def shadow(self, shadow: int, outcome: str) -> None:
        """Count an image that was, or was not, compared with a shadow's version."""
        self._of("shadow_images", str(shadow), outcome).inc()

    def shadow_difference(self, shadow: int, label: str, difference: float) -> None:
        """Record the largest logit difference of a class."""
        self._of("shadow_logit_difference", str(shadow), label).set(difference)

    def request(self, seconds: float, *, is_ok: bool) -> None:
        """Record how long a request took from its head to the first byte of its answer."""
        self._requests[is_ok].observe(seconds)
        self._count_down(1)

    def _count_down(self, observed: int) -> None:
        self._until_handed_over -= observed
        if self._until_handed_over <= 0:
            self._hand_over()

    def outcome(self, outcome: str) -> None:
        """Count an answered image."""
        series = self._outcomes.get(outcome)
        if series is None:  # found once, for the search costs more than the count
            series = self._outcomes[outcome] = self._of("images", outcome)
        series.inc()

    def depth_from(self, admitted: Callable[[], int], waiting: Callable[[], int] = lambda: 0) -> None:
        """Let the gauges of admitted and of waiting images ask whenever they are scraped."""
        self._depths = [(self._set("pending_request_count", 0), admitted), (self._set("queue_depth", 0), waiting)]

    def refresh(self) -> None:
        """Count what was held back, and ask for the gauges that are read only when somebody asks."""
        self._hand_over()
        for gauge, read in self._depths:
            gauge.set(read())

    def observe(self, stage: Stage, seconds: float) -> None:
        """Record the duration of one stage."""
        self._stages[stage].observe(seconds)

    def decoded(self, seconds: float) -> None:
        """Record how long an image took to decode."""
        self._stages["decode"].observe(seconds)

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Record how long the block takes."""
        started = perf_counter()
        try:
            yield
        finally:
            self._stages[stage].observe(perf_counter() - started)

    def _hand_over(self) -> None:
        self._until_handed_over = HANDED_OVER_EVERY
        for tally in self._tallies:
            tally.hand_over()
        if self._drift is not None:
            self._drift.hand_over()

    def _tally(self, name: str, *labels: str) -> Tally:
        tally = Tally(self._of(name, *labels))
        self._tallies.append(tally)
        return tally

    def _of(self, name: str, *labels: str) -> Any:
        return self._shelf.by_name[name].labels(*self._own, *labels)

    def _set(self, name: str, value: float, *labels: str) -> Any:
        self._gauges.append((name, labels))
        self._shelf.told[name, *self._own, *labels] += 1
        series = self._of(name, *labels)
        series.set(value)
        return series


class _Drift:
    """Sums of live pixels beside what training saw: mean and deviation over any window follow by division."""

    def __init__(self, metrics: ModelMetrics, manifest: Manifest) -> None:
        assert manifest.pixels is not None
        self._held: deque[NDArray[np.uint8]] = deque()
        self._count = metrics._of("input_pixels")  # noqa: SLF001 - one module, one owner of the instruments
        self._sums, self._squares = [], []
        for index, (mean, std) in enumerate(zip(manifest.pixels.mean, manifest.pixels.std, strict=True)):
            channel = str(index)
            metrics._set("training_pixel_mean", mean, channel)  # noqa: SLF001
            metrics._set("training_pixel_deviation", std, channel)  # noqa: SLF001
            self._sums.append(metrics._of("input_pixel_sum", channel))  # noqa: SLF001
            self._squares.append(metrics._of("input_pixel_square_sum", channel))  # noqa: SLF001

    def saw(self, images: NDArray[np.uint8]) -> None:
        """Hold a grid of the pixels of images (N, height, width, channels) until there are enough to be summed."""
        steps = [max(1, side // SAMPLED_SIDE) for side in images.shape[1:3]]
        self._held.append(images[:, :: steps[0], :: steps[1]].reshape(-1, images.shape[3]))
        if len(self._held) >= GRIDS_HELD:
            self.hand_over()

    def hand_over(self) -> None:
        """Add what is held to the sums."""
        grids = []
        with contextlib.suppress(IndexError):  # all of them, or another thread took the rest
            while True:
                grids.append(self._held.popleft())
        if not grids:
            return
        sampled = np.concatenate(grids).astype(np.float32)
        self._count.inc(len(sampled))
        ones = np.ones(len(sampled), np.float32)  # products with it are sums, ten times as fast as a sum over columns
        totals, squares = (ones @ sampled).tolist(), (ones @ sampled**2).tolist()
        for index, (total, square) in enumerate(zip(totals, squares, strict=True)):
            self._sums[index].inc(total / 255)
            self._squares[index].inc(square / 255**2)
