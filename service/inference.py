"""Which models are served, and whether they are: loading → ready → draining, or failed. Knows no HTTP."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Literal

from service.batching import Batcher
from service.certification import certify_model
from service.classifier import Classifier
from service.config import Settings, cpu_count
from service.engine import Device, OpenEngine, choose_device
from service.errors import (
    FoldserveError,
    MalformedRequest,
    ModelNotFound,
    NotCertified,
    NotReady,
    QueueFull,
)
from service.independence.certificate import Certificate
from service.independence.spotcheck import SpotCheck, Verdict
from service.metrics import Metrics, ModelMetrics
from service.preprocessing import Accepted, open_formats
from service.repository import Model, Repository
from service.running import Job, Logits, Runner

Status = Literal["loading", "ready", "draining", "failed"]
LAST_RUN_S = 2.0  # the server has waited `drain_timeout_s` for every answer before it stops the service

logger = logging.getLogger(__name__)


class Service:
    """The models that are served, and whether they are."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        open_engine: OpenEngine,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.status: Status = "loading"
        self.is_stuck = False  # True when a run outlived the drain: its thread cannot be ended
        self.device: Device | None = None
        self.accepted = Accepted(open_formats(settings.formats), settings.max_image_pixels)
        self._open_engine = open_engine
        self._on_failure = on_failure
        self._classifiers: dict[str, Classifier] = {}
        self._bytes_in_flight = 0
        self._resources = AsyncExitStack()

    @property
    def receipt_key(self) -> bytes | None:
        """The secret that signs receipts, where one is set."""
        key = self.settings.receipt_key
        return key.get_secret_value().encode() if key is not None and key.get_secret_value() else None

    @property
    def is_degraded(self) -> bool:
        """True when a spot check found other bits than certified and a model runs at its reference shape only."""
        return any(classifier.runner.is_degraded for classifier in self._classifiers.values())

    def classifiers(self) -> list[Classifier]:
        """Return the models that are served with their certificates, by name."""
        return list(self._classifiers.values())

    @property
    def is_ready(self) -> bool:
        """True while requests are answered."""
        return self.status == "ready"

    async def start(self) -> None:
        """Load every model of the repository; on failure tell `on_failure` and be `failed`."""
        try:
            await self._load_all()
        except Exception as error:
            self._fail(error)
            if not isinstance(error, FoldserveError):
                raise
        else:
            self.status = "ready"
            self.metrics.ready(True)
            served = ", ".join(f"{one.model.name} version {one.model.version}" for one in self._classifiers.values())
            logger.info("ready: serving %s on %s", served, self.device.used if self.device else "?")

    def begin_drain(self) -> None:
        """Be ready no more; a probe under way ends at its next step."""
        if self.status != "failed":
            self.status = "draining"
        self.metrics.ready(False)

    async def stop(self) -> None:
        """Answer what was accepted, then release everything."""
        self.begin_drain()
        try:
            async with asyncio.timeout(LAST_RUN_S):
                await self._resources.aclose()
        except TimeoutError:
            self.is_stuck = True
            logger.error("a run did not end in time; giving it up")

    @contextmanager
    def receiving(self, expected_bytes: int) -> Iterator[None]:
        """Hold room for a request body while it arrives. Raises QueueFull when the bodies in arrival are too many."""
        if self._bytes_in_flight + expected_bytes > self.settings.max_bytes_in_flight:
            raise QueueFull("too many request bodies are arriving at once", retry_after_s=1)
        self._bytes_in_flight += expected_bytes
        try:
            yield
        finally:
            self._bytes_in_flight -= expected_bytes

    def models(self) -> list[Model]:
        """Return what is served, by name."""
        return [classifier.model for classifier in self._classifiers.values()]

    def classifier(self, name: str | None = None, version: int | None = None) -> Classifier:
        """Return the classifier of a model, by default the only one or `default_model`.

        Raises NotReady, ModelNotFound, or MalformedRequest when a name is needed.
        """
        if not self.is_ready:
            raise NotReady(f"the service is {self.status}", retry_after_s=1)
        name = name or self.settings.default_model
        if name is None and len(self._classifiers) > 1:
            raise MalformedRequest(f"name a model with ?model=…; served are {', '.join(self._classifiers)}")
        found = self._classifiers.get(name) if name else next(iter(self._classifiers.values()))
        if found is None:
            raise ModelNotFound(f"no model {name} is served; served are {', '.join(self._classifiers)}")
        if version is not None and version != found.model.version:
            raise ModelNotFound(f"model {found.model.name} is served in version {found.model.version}, not {version}")
        return found

    async def _load_all(self) -> None:
        settings = self.settings
        self.device = await asyncio.to_thread(choose_device, settings.device)
        self.metrics.device(self.device.requested, self.device.used)
        repository = Repository(settings.models, self._open_engine, settings.form)
        names = repository.names()
        if settings.default_model is not None and settings.default_model not in names:
            raise ModelNotFound(
                f"default_model {settings.default_model} is not in {settings.models}: {', '.join(names)}"
            )
        decoders = ThreadPoolExecutor(settings.decode_threads or cpu_count(), thread_name_prefix="decode")
        self._resources.callback(decoders.shutdown, wait=False, cancel_futures=True)
        for name in names:
            model = await asyncio.to_thread(repository.load, name, self.device)
            logger.info(
                "loaded %s version %d (%s form, sha256 %s): %d golden images, largest difference %.2g",
                *(
                    model.name,
                    model.version,
                    model.form,
                    model.digest[:12],
                    model.golden_images,
                    model.golden_difference,
                ),
            )
            self._classifiers[name] = await self._open_classifier(model, decoders, self.device)

    async def _open_classifier(self, model: Model, decoders: ThreadPoolExecutor, device: Device) -> Classifier:
        settings = self.settings
        metrics = self.metrics.model(model.name, model.version, model.form, model.digest)
        certificate = await asyncio.to_thread(self._certify, model, device)
        runner = Runner(model, certificate if certificate and certificate.verdict == "certified" else None)
        batcher: Batcher[Job, Logits] = Batcher(
            runner.run,
            observer=metrics,
            take=runner.take,
            max_batch_size=settings.max_batch_size,
            max_queue_size=settings.max_queue_size,
            lanes=settings.lanes or (cpu_count() if device.used == "cpu" else 1),
            max_queue_delay_ms=settings.max_queue_delay_ms,
            on_death=self._fail,
        )
        metrics.depth_from(lambda: batcher.admitted)
        metrics.certificate(certificate.verdict if certificate else "none", certificate.digest if certificate else "")
        spot_check = SpotCheck(
            runner.replay,
            settings.spot_check_share if runner.reference else 0.0,
            partial(_settle_spot_check, model, runner, metrics),
        )
        await self._resources.enter_async_context(batcher)
        self._resources.push_async_callback(asyncio.to_thread, spot_check.__enter__().__exit__)
        return Classifier(model, runner, batcher, decoders, self.accepted, metrics, certificate, spot_check)

    def _certify(self, model: Model, device: Device) -> Certificate | None:
        """Return the model's certificate, None in mode `off`. Raises NotCertified in mode `strict` when refused."""
        if self.settings.mode == "off":
            return None
        try:
            certificate = certify_model(model, device, self.settings, partial(self._report_probe, model.name))
        except NotCertified as error:
            if self.settings.mode == "strict":
                raise
            logger.warning("model %s is served WITHOUT a certificate: %s", model.name, error)
            return None
        if certificate.verdict == "certified":
            sizes = ", ".join(f"{one.batch_size}×{one.threads}" for one in certificate.shapes)
            logger.info("certificate %s: images×threads %s give equal bits", certificate.digest[:12], sizes)
        elif self.settings.mode == "report":
            logger.warning("model %s is served WITHOUT a certificate: %s", model.name, certificate.reason)
        else:
            raise NotCertified(
                f"model {model.name} version {model.version} is refused: {certificate.reason}; "
                "--mode report serves it all the same and says so"
            )
        return certificate

    def _report_probe(self, name: str, step: str, done: float) -> None:
        if self.status != "loading":  # called from the probe's own thread, which nothing else could end
            raise NotReady("shutting down", retry_after_s=1)
        logger.info("probing %s: %s (%.0f %%)", name, step, 100 * done)

    def _fail(self, error: BaseException) -> None:
        self.status = "failed"
        self.metrics.ready(False)
        if self._on_failure is not None:
            self._on_failure(error)


def _settle_spot_check(model: Model, runner: Runner, metrics: ModelMetrics, verdict: Verdict) -> None:
    metrics.spot_check(verdict)
    if verdict == "reference unstable" and not runner.is_refuted:
        logger.error("model %s gives an image alone other bits each time: its certificate is void", model.name)
    was_degraded = runner.is_degraded
    if verdict != "agreed":
        runner.degrade(is_refuted=verdict == "reference unstable")
    if verdict != "agreed" and not was_degraded:
        metrics.degraded()
        logger.error("model %s is degraded: from now on it runs at its reference shape only", model.name)
