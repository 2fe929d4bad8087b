"""Prometheus instruments, in a registry of their own for each app. The only user of prometheus_client.

Names follow Triton's vocabulary where it has one; durations are in seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

Stage = Literal["read", "decode", "queue", "infer", "encode"]

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """All instruments of one service."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each, which nobody reads
        self._registry = CollectorRegistry()
        at: Any = {"namespace": "foldserve", "registry": self._registry}
        self._requests = Counter("http_requests", "HTTP requests by route and status code", ["route", "code"], **at)
        self._images = Counter("images", "Images by outcome: ok or the problem's type", ["model", "outcome"], **at)
        self._stages = Histogram(
            "stage_duration_seconds", "Time in a stage of the way", ["model", "stage"], buckets=SECONDS, **at
        )
        self._batches = Histogram("batch_size", "Images that ran together", ["model"], buckets=SIZES, **at)
        self._dropped = Counter("dropped", "Images that left the queue unrun", ["model", "reason"], **at)
        self._depth = Gauge("pending_request_count", "Images admitted and not yet answered", ["model"], **at)
        self._ready = Gauge("ready", "1 while the service takes traffic", **at)
        self._device = Gauge("device_info", "Where models run, and what was asked for", ["requested", "used"], **at)
        self._certificates = Gauge("certificate_info", "Verdict and digest", ["model", "verdict", "digest"], **at)
        self._spot_checks = Counter(
            "spot_checks", "Answers run again alone, by what came of it", ["model", "verdict"], **at
        )
        self._degraded = Gauge("degraded", "1 while a model runs at its reference shape only", ["model"], **at)
        self._model = Gauge("model_info", "What is served", ["model", "version", "form", "digest"], **at)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus's text format, of the media type CONTENT_TYPE."""
        return generate_latest(self._registry)

    def request(self, route: str, code: int) -> None:
        """Count an answered HTTP request."""
        self._requests.labels(route, str(code)).inc()

    def ready(self, is_ready: bool) -> None:  # noqa: FBT001 - a gauge of one bit
        """Record whether the service takes traffic."""
        self._ready.set(is_ready)

    def device(self, requested: str, used: str) -> None:
        """Record where models run."""
        self._device.labels(requested, used).set(1)

    def model(self, name: str, version: int, form: str, digest: str) -> "ModelMetrics":
        """Record that a model is served; return its own instruments."""
        self._model.labels(name, str(version), form, digest).set(1)
        return ModelMetrics(self, name)


class ModelMetrics:
    """The instruments of one model; an observer for its batcher."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._name = name
        self._images = metrics._images  # noqa: SLF001 - one module, one owner of the instruments
        self._certificates = metrics._certificates  # noqa: SLF001
        self._spot_checks = metrics._spot_checks  # noqa: SLF001
        self._degraded = metrics._degraded.labels(name)  # noqa: SLF001
        self._dropped = metrics._dropped  # noqa: SLF001
        self._depth = metrics._depth.labels(name)  # noqa: SLF001
        self._batches = metrics._batches.labels(name)  # noqa: SLF001
        stages: tuple[Stage, ...] = ("read", "decode", "queue", "infer", "encode")
        self._stages = {stage: metrics._stages.labels(name, stage) for stage in stages}  # noqa: SLF001

    def ran(self, size: int, queue_s: Sequence[float], run_s: float) -> None:
        """Record a batch."""
        self._batches.observe(size)
        self._stages["infer"].observe(run_s)
        for seconds in queue_s:
            self._stages["queue"].observe(seconds)

    def dropped(self, reason: str) -> None:
        """Count an image that left the queue unrun."""
        self._dropped.labels(self._name, reason).inc()

    def certificate(self, verdict: str, digest: str) -> None:
        """Record what the certificate says."""
        self._certificates.labels(self._name, verdict, digest).set(1)

    def spot_check(self, verdict: str) -> None:
        """Count a spot check."""
        self._spot_checks.labels(self._name, verdict).inc()

    def degraded(self) -> None:
        """Record that the model runs at its reference shape only."""
        self._degraded.set(1)

    def outcome(self, outcome: str) -> None:
        """Count an answered image."""
        self._images.labels(self._name, outcome).inc()

    def depth_from(self, read: Callable[[], int]) -> None:
        """Let the gauge of waiting images ask `read` whenever it is scraped."""
        self._depth.set_function(read)

    def observe(self, stage: Stage, seconds: float) -> None:
        """Record the duration of one stage."""
        self._stages[stage].observe(seconds)

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Record how long the block takes."""
        started = perf_counter()
        try:
            yield
        finally:
            self._stages[stage].observe(perf_counter() - started)
