"""From a version's folder to a classifier that can answer: load, golden check, certify, warm, open its queue."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial

from service import clock
from service.batching import Batcher
from service.caching import AnswerCache
from service.certification import certify_model
from service.classifier import Classifier
from service.config import Settings
from service.crew import Crew
from service.decoding import Decoders
from service.engine import Device
from service.errors import NotCertified, NotReady
from service.independence.certificate import Certificate
from service.independence.probe import fill
from service.independence.spotcheck import SpotCheck, Verdict
from service.metrics import Metrics
from service.model_metrics import ModelMetrics
from service.preprocessing import Accepted
from service.repository import Model, Repository
from service.running import Job, Logits, Runner

logger = logging.getLogger(__name__)


class Opened:
    """A classifier with what must be released after it, and the number of requests that hold it."""

    def __init__(self, classifier: Classifier, resources: AsyncExitStack, stamp: object) -> None:
        self.classifier = classifier
        self.stamp = stamp
        self._resources = resources
        self._holders = 0
        self._unheld = asyncio.Event()
        self._unheld.set()

    def __enter__(self) -> Classifier:
        """Let one more request hold it: as long as one does, `retire` waits."""
        self._holders += 1
        if self._holders == 1:
            self._unheld.clear()
        return self.classifier

    def __exit__(self, *_: object) -> None:
        """Let one request less hold it."""
        self._holders -= 1
        if self._holders == 0:
            self._unheld.set()

    async def retire(self) -> None:
        """Wait until no request holds it, answer what it has, release everything."""
        await self._unheld.wait()
        await self.close()
        self.classifier.metrics.retire()

    async def close(self) -> None:
        """Answer what was let in, release everything."""
        await self._resources.aclose()


class Opener:
    """Opens versions. `is_ending` ends a probe at its next step; `on_death` is told of a batcher that died."""

    def __init__(
        self,
        settings: Settings,
        repository: Repository,
        device: Device,
        decoders: Decoders,
        accepted: Accepted,
        metrics: Metrics,
        *,
        crew: Crew,
        is_ending: Callable[[], bool],
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._device = device
        self._decoders = decoders
        self._accepted = accepted
        self._metrics = metrics
        self._crew = crew
        self._is_ending = is_ending
        self._on_death = on_death

    async def open(self, name: str, version: int, *, stamp: object, lanes: int | None = None) -> Opened:
        """Open a version; with nothing left behind where that fails. Raises ArtifactError or NotCertified."""
        beside = (one for one in self._crew.certificates.values() if (one.model, one.version) == (name, version))
        form = next((one.form for one in beside), None)  # the crew serves one form, whatever each would measure
        model = await asyncio.to_thread(self._repository.load, name, self._device, version, form)
        logger.info(
            "loaded %s version %d (%s form, sha256 %s): %d golden images, largest difference %.2g",
            *(name, version, model.form, model.digest[:12], model.golden_images, model.golden_difference),
        )
        certificate = await asyncio.to_thread(self._certify, model)
        _check_clock(model, certificate)
        await asyncio.to_thread(_warm, model, certificate)
        model.settle()
        async with AsyncExitStack() as resources:
            classifier = await self._build(model, certificate, resources, lanes)
            return Opened(classifier, resources.pop_all(), stamp)

    async def _build(
        self, model: Model, certificate: Certificate | None, resources: AsyncExitStack, lanes: int | None
    ) -> Classifier:
        settings = self._settings
        metrics = self._metrics.model(model.name, model.version, model.form, model.digest, model.manifest)
        is_certified = certificate is not None and certificate.verdict == "certified"
        runner = Runner(model, certificate if is_certified else None, metrics)
        lanes = lanes or settings.lanes or (settings.cores_share if self._device.used == "cpu" else 1)
        decoding = settings.decode_threads or settings.cores_share
        batcher: Batcher[Job, Logits] = Batcher(
            runner.run,
            observer=metrics,
            take=runner.take,
            max_batch_size=settings.max_batch_size,
            max_queue_size=settings.queue_share,
            lanes=lanes,
            ahead=lambda: lanes * (runner.most_together or settings.max_batch_size) + decoding,
            enough=runner.enough,
            max_queue_delay_ms=settings.max_queue_delay_ms,
            on_death=self._on_death,
        )
        metrics.depth_from(lambda: batcher.admitted, lambda: batcher.depth)
        metrics.certificate(certificate.verdict if certificate else "none", certificate.digest if certificate else "")
        share = settings.spot_check_share if runner.reference else 0.0
        settle = partial(self._settle_spot_check, asyncio.get_running_loop(), model, runner, metrics)
        spot_check = SpotCheck(runner.replay, share, settle)
        await resources.enter_async_context(batcher)
        resources.push_async_callback(asyncio.to_thread, spot_check.__enter__().__exit__)
        cache = AnswerCache(settings.cache_answers) if is_certified and settings.share_identical else None
        return Classifier(
            model, runner, batcher, self._decoders, self._accepted, metrics, certificate, spot_check, cache=cache,
            on_loss=self._on_death,
        )  # fmt: skip

    def _certify(self, model: Model) -> Certificate | None:
        """Return the model's certificate, None in mode `off`. Raises NotCertified in mode `strict` when refused."""
        if self._settings.mode == "off":
            return None
        try:
            report = partial(self._report_probe, model.name)
            certificate = certify_model(model, self._device, self._settings, report, self._crew.certificates)
        except NotCertified as error:
            if self._settings.mode == "strict":
                raise
            logger.warning("model %s is served WITHOUT a certificate: %s", model.name, error)
            return None
        if certificate.verdict == "certified":
            sizes = ", ".join(f"{one.batch_size}×{one.threads}" for one in certificate.shapes)
            logger.info("certificate %s: images×threads %s give equal bits", certificate.digest[:12], sizes)
        elif self._settings.mode == "report":
            logger.warning("model %s is served WITHOUT a certificate: %s", model.name, certificate.reason)
        else:
            raise NotCertified(
                f"model {model.name} version {model.version} is refused: {certificate.reason}; "
                "--mode report serves it all the same and says so"
            )
        return certificate

    def _settle_spot_check(
        self,
        loop: asyncio.AbstractEventLoop,
        model: Model,
        runner: Runner,
        metrics: ModelMetrics,
        verdict: Verdict,
    ) -> None:
        metrics.spot_check(verdict)
        is_refuted = verdict == "reference unstable"
        if verdict == "agreed" or (runner.is_degraded and (runner.is_refuted or not is_refuted)):
            return
        degrade(model, runner, metrics, is_refuted=is_refuted)  # at once, whatever the others are doing
        order = {"model": model.name, "version": model.version, "is_refuted": runner.is_refuted}
        telling = self._crew.tell_all("degrade", order, kept_as=f"degrade {model.name} {model.version}")
        asyncio.run_coroutine_threadsafe(telling, loop)

    def _report_probe(self, name: str, step: str, done: float) -> None:
        if self._is_ending():  # called from the probe's own thread, which nothing else could end
            raise NotReady("shutting down", retry_after_s=1)
        logger.info("probing %s: %s (%.0f%%)", name, step, 100 * done)


def _check_clock(model: Model, certificate: Certificate | None) -> None:
    certified = certificate.measured.created if certificate is not None else None
    trained = model.manifest.training.get("date")
    if problem := clock.contradiction(datetime.now(UTC), certified=certified, trained=trained):
        logger.warning("model %s: %s", model.name, problem)


def _warm(model: Model, certificate: Certificate | None) -> None:
    """Run every shape that may be served once, so that no request pays for a session or a plan."""
    golden = model.artifact.golden.pixels
    for shape in (record.shape for record in (certificate.shapes if certificate else ())):
        model.run(fill(golden[: shape.batch_size], shape.batch_size), shape.threads)


def degrade(model: Model, runner: Runner, metrics: ModelMetrics, *, is_refuted: bool) -> None:
    """Let a model run at its reference shape only, and say so once; `is_refuted`: not even that gives the same bits."""
    if is_refuted and not runner.is_refuted:
        logger.error("model %s gives an image alone other bits each time: its certificate is void", model.name)
    was_degraded = runner.is_degraded
    runner.degrade(is_refuted=is_refuted)
    if not was_degraded:
        metrics.degraded()
        logger.error("model %s is degraded: from now on it runs at its reference shape only", model.name)
