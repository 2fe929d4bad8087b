"""Prometheus instruments, in a registry of their own for each app. The only user of prometheus_client.

Names follow Triton's vocabulary where it has one; durations are in seconds. All are plain counters, gauges and
histograms, so that several processes' counts add up. docs/operations.md lists them.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

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
from service.model_metrics import ModelMetrics, Shelf

Merged = Literal["livemax", "livesum"]  # of several workers' gauges: they agree, or they add up

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)
CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
OF_MODEL = ("model", "version")


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
        self._answered: dict[tuple[str, int, str], Counter] = {}
        self._shelf = Shelf(_instruments_of_models(at), can_forget=worker is None)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus's text format, of the media type CONTENT_TYPE."""
        self.refresh()
        return generate_latest(self._registry if self._merged is None else self._merged)

    def refresh(self) -> None:
        """Bring up to date what is read only when somebody asks, in this process."""
        for model in self._shelf.open_models:
            model.refresh()

    def request(self, route: str, code: int, reason: str = "ok") -> None:
        """Count an answered HTTP request."""
        series = self._answered.get((route, code, reason))
        if series is None:  # found once, for the search costs more than the count
            series = self._answered[route, code, reason] = self._requests.labels(route, str(code), reason)
        series.inc()

    def ready(self, is_ready: bool) -> None:  # noqa: FBT001 - a gauge of one bit
        """Record whether the service takes traffic."""
        self._ready.set(is_ready)

    def device(self, requested: str, used: str) -> None:
        """Record where models run."""
        self._device.labels(requested, used).set(1)

    def model(self, name: str, version: int, form: str, digest: str, manifest: Manifest | None = None) -> ModelMetrics:
        """Record that a model is served; return its own instruments."""
        return ModelMetrics(self._shelf, name, version, form, digest, manifest)

    def counts(self) -> dict[tuple[str, str], list[tuple[str, dict[str, str], float]]]:
        """Return by model and version what was counted of them, over all workers: name, labels, value."""
        self.refresh()
        found: defaultdict[tuple[str, str], list[tuple[str, dict[str, str], float]]] = defaultdict(list)
        for family in (self._registry if self._merged is None else self._merged).collect():
            for name, labels, value in (sample[:3] for sample in family.samples):
                if "version" in labels:
                    found[labels["model"], labels["version"]].append((name, labels, value))
        return found


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
        gauge("queue_depth", "Images that wait for a lane, or for their turn to be decoded for one", mode="livesum"),
        counter("images", "Images by outcome: ok or the problem's type", "outcome"),
        histogram("stage_duration_seconds", "Time in a stage of the way", "stage", buckets=SECONDS),
        histogram("request_duration_seconds", "From a request's head to its answer", "outcome", buckets=SECONDS),
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
