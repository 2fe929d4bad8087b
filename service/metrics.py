"""Prometheus instruments, in a registry of their own for each app. The only user of prometheus_client.

Names follow Triton's vocabulary where it has one; durations are in seconds. All are plain counters, gauges and
histograms, so that several processes' counts add up. docs/operations.md lists them.
"""

from collections import Counter as Counts
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector

from service.manifest import Manifest

Stage = Literal["read", "decode", "queue", "infer", "encode"]

Merged = Literal["livemax", "livesum"]  # of several workers' gauges: they agree, or they add up

STAGES: tuple[Stage, ...] = ("read", "decode", "queue", "infer", "encode")
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)
CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
OF_MODEL = ("model", "version")
SAMPLED_SIDE = 32  # drift looks at a grid of at most about 32 × 32 pixels of an image: a few microseconds


class Metrics:
    """All instruments of one service."""

    def __init__(self, worker: int | None = None) -> None:
        """Make the instruments; with a `worker`'s number, in files that it shares with the other workers.

        Such files outlive a process that is killed, and its successor of the same number counts on.
        """
        self._merged: CollectorRegistry | None = None
        if worker is not None:
            values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]
            self._merged = CollectorRegistry()
            MultiProcessCollector(self._merged)  # type: ignore[no-untyped-call]
        disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each, which nobody reads
        self._registry = CollectorRegistry()
        at: Any = {"namespace": "foldserve", "registry": self._registry}
        self._requests = Counter(
            "http_requests", "HTTP requests by route, status code, and `ok` or the problem's type",
            ["route", "code", "reason"], **at,
        )  # fmt: skip
        self._ready = Gauge("ready", "1 while the service takes traffic", multiprocess_mode="livemin", **at)
        self._device = Gauge(
            "device_info", "Where models run, and what was asked for", ["requested", "used"],
            multiprocess_mode="livemax", **at,
        )  # fmt: skip
        self.of_models = _instruments_of_models(at)
        self._open: set[ModelMetrics] = set()
        self._told: Counts[tuple[str, ...]] = Counts()  # how many opened models say each gauge

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus's text format, of the media type CONTENT_TYPE."""
        self.refresh()
        return generate_latest(self._registry if self._merged is None else self._merged)

    def refresh(self) -> None:
        """Bring the gauges up to date that are read only when somebody asks."""
        for model in self._open:
            model.refresh()

    def request(self, route: str, code: int, reason: str = "ok") -> None:
        """Count an answered HTTP request."""
        self._requests.labels(route, str(code), reason).inc()

    def ready(self, is_ready: bool) -> None:  # noqa: FBT001 - a gauge of one bit
        """Record whether the service takes traffic."""
        self._ready.set(is_ready)

    def device(self, requested: str, used: str) -> None:
        """Record where models run."""
        self._device.labels(requested, used).set(1)

    def model(
        self, name: str, version: int, form: str, digest: str, manifest: Manifest | None = None
    ) -> "ModelMetrics":
        """Record that a model is served; return its own instruments."""
        return ModelMetrics(self.of_models, self._told, self._open, name, version, form, digest, manifest)


def _instruments_of_models(at: Any) -> dict[str, Any]:
    """Return every instrument that has a series for each model, by name."""

    def counter(name: str, text: str, *labels: str) -> tuple[str, Counter]:
        return name, Counter(name, text, [*OF_MODEL, *labels], **at)

    def gauge(name: str, text: str, *labels: str, mode: Merged = "livemax") -> tuple[str, Gauge]:
        return name, Gauge(name, text, [*OF_MODEL, *labels], multiprocess_mode=mode, **at)

    def histogram(name: str, text: str, *labels: str, buckets: Sequence[float]) -> tuple[str, Histogram]:
        return name, Histogram(name, text, [*OF_MODEL, *labels], buckets=buckets, **at)

    return dict((
        gauge("model_info", "What is served", "form", "digest"),
        gauge("certificate_info", "Verdict and digest", "verdict", "digest"),
        gauge("degraded", "1 while a model runs at its reference shape only"),
        gauge("pending_request_count", "Images admitted and not yet answered", mode="livesum"),
        gauge("queue_depth", "Images that wait for a lane", mode="livesum"),
        counter("images", "Images by outcome: ok or the problem's type", "outcome"),
        histogram("stage_duration_seconds", "Time in a stage of the way", "stage", buckets=SECONDS),
        histogram("batch_size", "Images that ran together", buckets=SIZES),
        counter("executed_rows", "Rows of all executed batches, padding included"),
        counter("padding_rows", "Rows of executed batches that held no image"),
        counter("dropped", "Images that were not run because nobody waited any more", "reason"),
        counter("shared", "Images answered by the run of an identical one"),
        counter("cache_hits", "Images answered from the cache"),
        counter("cache_misses", "Images that were looked for in the cache in vain"),
        counter("spot_checks", "Answers run again alone, by what came of it", "verdict"),
        counter("predictions", "Answers by their most probable class", "label"),
        histogram("confidence", "Softmax probability of the most probable class", buckets=CONFIDENCES),
        counter("input_pixels", "Pixels that were sampled from live images, per channel"),
        counter("input_pixel_sum", "Sum of sampled pixels, 0 to 1", "channel"),
        counter("input_pixel_square_sum", "Sum of squares of sampled pixels", "channel"),
        gauge("training_pixel_mean", "Channel mean of the training pixels, 0 to 1", "channel"),
        gauge("training_pixel_deviation", "Channel deviation of the training pixels", "channel"),
        counter("shadow_images", "Images compared with a shadow, by what came of it", "shadow", "outcome"),
        gauge("shadow_logit_difference", "Largest difference seen between shadow and stable", "shadow", "label"),
    ))  # fmt: skip


class ModelMetrics:
    """The instruments of one model: an observer for its batcher, its runner and its decoder."""

    def __init__(
        self,
        instruments: dict[str, Any],
        told: "Counts[tuple[str, ...]]",
        open_models: "set[ModelMetrics]",
        name: str,
        version: int,
        form: str,
        digest: str,
        manifest: Manifest | None = None,
    ) -> None:
        self._all = instruments
        self._told = told
        self._own = (name, str(version))
        self._open = open_models
        self._open.add(self)
        self._gauges: list[tuple[str, tuple[str, ...]]] = []
        self._depths: list[tuple[Any, Callable[[], int]]] = []
        self._set("model_info", 1, form, digest)
        self._degraded = self._set("degraded", 0)
        self._batches, self._confidence = self._of("batch_size"), self._of("confidence")
        self._rows, self._padding = self._of("executed_rows"), self._of("padding_rows")
        self._shared, self._hits, self._misses = self._of("shared"), self._of("cache_hits"), self._of("cache_misses")
        self._stages = {stage: self._of("stage_duration_seconds", stage) for stage in STAGES}
        self._dropped = {reason: self._of("dropped", reason) for reason in ("cancelled", "deadline")}
        self._labels = [self._of("predictions", label) for label in manifest.labels] if manifest else []
        self._drift = _Drift(self, manifest) if manifest is not None and manifest.pixels is not None else None

    def retire(self) -> None:
        """Take back what says that the model is served; what was counted stays, as counters must."""
        self._open.discard(self)
        for name, labels in self._gauges:
            key = (name, *self._own, *labels)
            self._told[key] -= 1
            if not self._told[key]:  # a version that was opened anew says the same
                self._of(name, *labels).set(0)  # several processes' files cannot forget a series
                if values.ValueClass is values.MutexValue:
                    self._all[name].remove(*self._own, *labels)
        self._gauges.clear()

    def ran(self, size: int, queue_s: Sequence[float], run_s: float) -> None:
        """Record a batch."""
        self._batches.observe(size)
        self._stages["infer"].observe(run_s)
        for seconds in queue_s:
            self._stages["queue"].observe(seconds)

    def executed(self, rows: int, padding: int) -> None:
        """Count the rows of an executed batch, and those of them that only filled it."""
        self._rows.inc(rows)
        if padding:
            self._padding.inc(padding)

    def answered(self, images: NDArray[np.uint8], logits: NDArray[np.float32]) -> None:
        """Record what images (N, height, width, channels) looked like and what they were taken for, logits (N, K)."""
        best = logits.max(axis=1, keepdims=True)
        confidences = 1.0 / np.exp(logits - best).sum(axis=1)
        for index, confidence in zip(logits.argmax(axis=1).tolist(), confidences.tolist(), strict=True):
            self._labels[index].inc()
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

    def outcome(self, outcome: str) -> None:
        """Count an answered image."""
        self._of("images", outcome).inc()

    def depth_from(self, admitted: Callable[[], int], waiting: Callable[[], int] = lambda: 0) -> None:
        """Let the gauges of admitted and of waiting images ask whenever they are scraped."""
        self._depths = [(self._set("pending_request_count", 0), admitted), (self._set("queue_depth", 0), waiting)]

    def refresh(self) -> None:
        """Ask for the gauges that are read only when somebody asks."""
        for gauge, read in self._depths:
            gauge.set(read())

    def observe(self, stage: Stage, seconds: float) -> None:
        """Record the duration of one stage."""
        self._stages[stage].observe(seconds)

    def timed_decode(self) -> AbstractContextManager[None]:
        """Record how long an image takes to decode."""
        return self.timed("decode")

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Record how long the block takes."""
        started = perf_counter()
        try:
            yield
        finally:
            self._stages[stage].observe(perf_counter() - started)

    def _of(self, name: str, *labels: str) -> Any:
        return self._all[name].labels(*self._own, *labels)

    def _set(self, name: str, value: float, *labels: str) -> Any:
        self._gauges.append((name, labels))
        self._told[name, *self._own, *labels] += 1
        series = self._of(name, *labels)
        series.set(value)
        return series


class _Drift:
    """Sums of live pixels beside what training saw: mean and deviation over any window follow by division."""

    def __init__(self, metrics: ModelMetrics, manifest: Manifest) -> None:
        assert manifest.pixels is not None
        self._count = metrics._of("input_pixels")  # noqa: SLF001 - one module, one owner of the instruments
        self._sums, self._squares = [], []
        for index, (mean, std) in enumerate(zip(manifest.pixels.mean, manifest.pixels.std, strict=True)):
            channel = str(index)
            metrics._set("training_pixel_mean", mean, channel)  # noqa: SLF001
            metrics._set("training_pixel_deviation", std, channel)  # noqa: SLF001
            self._sums.append(metrics._of("input_pixel_sum", channel))  # noqa: SLF001
            self._squares.append(metrics._of("input_pixel_square_sum", channel))  # noqa: SLF001

    def saw(self, images: NDArray[np.uint8]) -> None:
        """Add a grid of the pixels of images (N, height, width, channels)."""
        steps = [max(1, side // SAMPLED_SIDE) for side in images.shape[1:3]]
        sampled = images[:, :: steps[0], :: steps[1]].reshape(-1, images.shape[3]).astype(np.float32) / 255
        self._count.inc(len(sampled))
        squares = np.einsum("pc,pc->c", sampled, sampled)
        for index, (total, square) in enumerate(zip(sampled.sum(axis=0).tolist(), squares.tolist(), strict=True)):
            self._sums[index].inc(total)
            self._squares[index].inc(square)
