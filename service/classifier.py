"""One model with its queue: an image's way from bytes to logits, replays, receipts, spot checks. Knows no HTTP."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from service.admission import Admitted
from service.batching import Batcher
from service.caching import AnswerCache
from service.decoding import Decoders
from service.errors import EngineLost, InferenceFailed, MalformedRequest, ServiceError, without_frames
from service.independence.certificate import Certificate
from service.independence.receipts import Receipt, logits_digest, pixels_digest
from service.independence.spotcheck import SpotCheck
from service.model_metrics import ModelMetrics
from service.preparing import Prepared, Preparer
from service.preprocessing import Accepted
from service.queueing import Listening, Priority
from service.repository import Model
from service.running import Job, Logits, Pixels, Runner
from service.tracing import stage

EXAMINED_AFTER_S = (0.0, 0.5, 2.0)  # so that a passing shortage of memory is no end

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """What the model saw, uint8 (height, width, channels), and what it said, float32 (classes,)."""

    pixels: NDArray[np.uint8]
    logits: NDArray[np.float32]


Outcome = Answered | ServiceError


class Classifier:
    """One model with its queue. `cache` None: no run is shared, and no answer kept."""

    def __init__(
        self,
        model: Model,
        runner: Runner,
        batcher: Batcher[Job, Logits],
        decoders: Decoders,
        accepted: Accepted,
        metrics: ModelMetrics,
        certificate: Certificate | None,
        spot_check: SpotCheck,
        *,
        cache: AnswerCache | None = None,
        on_loss: Callable[[BaseException], None],
    ) -> None:
        self.model = model
        self.runner = runner
        self.metrics = metrics
        self._certificate = certificate
        self._certificate_digest = None if certificate is None else certificate.digest  # a hash of all that it says
        self._batcher = batcher
        self._preparer = Preparer(model.manifest.preprocessing, accepted, decoders, batcher.lookahead, metrics)
        self._spot_check = spot_check
        self._cache = cache
        self._on_loss = on_loss
        self._examination: asyncio.Task[None] | None = None
        self.on_answer: Callable[[bytes, Answered], None] | None = None  # a shadow listens here

    @property
    def is_busy(self) -> bool:
        """True while images wait for a lane."""
        return self._batcher.depth > 0

    @property
    def shares(self) -> bool:
        """True while one answer may stand for all identical images: under a certificate that nothing has shaken."""
        return self._cache is not None and not self.runner.is_degraded

    @property
    def certificate(self) -> Certificate | None:
        """The certificate, a refusal included, or None: without one, or once the reference was seen to change."""
        return None if self.runner.is_refuted else self._certificate

    @property
    def certificate_digest(self) -> str | None:
        """The certificate's digest, or None where there is no certificate."""
        return None if self.runner.is_refuted else self._certificate_digest

    def check_receipts(self) -> None:
        """Raise MalformedRequest where answers have no receipts: before an image is run for one."""
        self._certified()

    def check_room(self) -> None:
        """Raise QueueFull or NotReady when not even one image would be let in: before a body is read for nothing."""
        self._batcher.check_room(1)

    async def classify(
        self,
        images: Sequence[bytes] | Sequence[Pixels],
        *,
        deadline: float,
        priority: Priority = "normal",
        is_replay: bool = False,
    ) -> list[Outcome]:
        """Return for each image what the model saw and said, or the error that is its own; the others go untouched.

        An image is a file, or pixels as the model wants them, uint8 (height, width, channels). `deadline` is a time
        of `time.monotonic`, in seconds; `is_replay` runs each alone at the reference shape.
        Raises QueueFull or NotReady for all of them.
        """
        with self.admit(len(images)):
            common = partial(self.classify_one, deadline=deadline, priority=priority, is_replay=is_replay)
            if len(images) == 1:  # which is the usual case, and needs no task of its own
                shares = self.shares and not is_replay
                prepared = self._preparer.at_once(images[0], deadline, with_digest=shares)
                return [await common(images[0], prepared=prepared)]
            return list(await asyncio.gather(*(common(image, is_alone=False) for image in images)))

    def admit(self, count: int) -> Admitted:
        """Return a context that holds room for so many images. Raises NotReady; entering it raises QueueFull."""
        return self._batcher.admit(count)

    async def answer(self, pixels: Pixels, *, deadline: float, priority: Priority) -> Logits:
        """Return the logits (classes,) of decoded pixels. Raises as `classify`, and DeadlineExceeded."""
        with self._batcher.admit(1):
            return await self._batcher.submit(Job(pixels), deadline=deadline, priority=priority)

    def receipt(self, answered: Answered, key: bytes | None) -> Receipt:
        """Return an answer's receipt, signed where there is a key. Raises MalformedRequest without a certificate."""
        answer_digest = self._certified()
        return Receipt(
            model=self.model.name,
            version=self.model.version,
            form=self.model.form,
            model_digest=self.model.digest,
            certificate=self._certificate_digest or "",
            answer_digest=answer_digest,
            pixels=pixels_digest(answered.pixels),
            logits=logits_digest(answered.logits),
        ).signed(key)

    def _certified(self) -> str:
        certificate = self.certificate
        if certificate is None or certificate.answer_digest is None:
            raise MalformedRequest(f"model {self.model.name} has no certificate, so its answers have no receipts")
        return certificate.answer_digest

    async def classify_one(
        self,
        image: bytes | Pixels,
        *,
        deadline: float,
        priority: Priority,
        is_replay: bool = False,
        is_alone: bool = True,
        prepared: Prepared | ServiceError | None = None,
    ) -> Outcome:
        """Do as `classify` does for one image that was admitted; `is_alone` where its request has no other.

        `prepared` is what `prepare_at_once` gave for it, if that was asked.
        """
        if isinstance(prepared, ServiceError):
            return without_frames(prepared)
        try:
            if prepared is None:
                shares = self.shares and not is_replay
                prepared = await self._preparer.prepare(
                    image, deadline, priority, with_digest=shares, is_alone=is_alone
                )
            logits = self._cached(prepared)
            if logits is None:
                started = perf_counter()
                logits = await self._batcher.submit(
                    Job(prepared.pixels, is_replay),
                    deadline=deadline, priority=priority, key=prepared.digest, turn=prepared.turn,
                )  # fmt: skip
                stage("infer", perf_counter() - started, model=self.model.name, version=self.model.version)
            return self._finished(image, prepared, logits, is_replay=is_replay)
        except Exception as error:  # noqa: BLE001 - a lone surprise must neither fail its neighbours nor outlive them
            return self._failed(error)

    def begin(
        self, prepared: Prepared, hear: Callable[[Logits | Exception], None], *, deadline: float, priority: Priority
    ) -> Listening[Logits] | None:
        """Do as `classify_one` for an image that was admitted and prepared, for a caller without a task of his own.

        `hear` gets what the model said, for `finish`; at once, and there is nobody to leave, where that was kept.
        Raises NotReady.
        """
        if (kept := self._cached(prepared)) is not None:
            hear(kept)
            return None
        job = Job(prepared.pixels)
        return self._batcher.begin(job, hear, deadline=deadline, priority=priority, key=prepared.digest)

    def finish(self, image: bytes, prepared: Prepared, said: Logits | Exception) -> Outcome:
        """Return the outcome of what the model said of an image, whatever hangs on it done."""
        if isinstance(said, Exception):
            return self._failed(said)
        try:
            return self._finished(image, prepared, said, is_replay=False)
        except Exception as error:  # noqa: BLE001 - as in `classify_one`
            return self._failed(error)

    def _finished(self, image: bytes | Pixels, prepared: Prepared, logits: Logits, *, is_replay: bool) -> Answered:
        self._keep(prepared.digest, logits)
        answered = Answered(prepared.pixels, logits)
        if not is_replay:
            self._spot_check.offer(prepared.pixels, logits)
            if self.on_answer is not None and isinstance(image, bytes):
                self.on_answer(image, answered)
        return answered

    def _failed(self, error: Exception) -> ServiceError:
        if isinstance(error, InferenceFailed):
            logger.error("%s: %s", error, error.__cause__)
            self._suspect()
            return error
        if isinstance(error, ServiceError):
            return without_frames(error)
        logger.error("an image failed in a way that nobody foresaw", exc_info=error)
        return InferenceFailed("the service failed on this image; its log says why")

    def prepare_at_once(self, image: bytes, deadline: float) -> Prepared | ServiceError | None:
        """Return a lone image prepared where that takes no waiting, as `Preparer.at_once`; `classify_one` takes it."""
        return self._preparer.at_once(image, deadline, with_digest=self.shares)

    def _suspect(self) -> None:
        if self._examination is None or self._examination.done():
            self._examination = asyncio.create_task(self._examine())

    async def _examine(self) -> None:
        """Tell `on_loss` when not even a golden image can be answered, thrice: a lost device, or no memory at all."""
        golden = self.model.artifact.golden.pixels[0]
        for wait_s in EXAMINED_AFTER_S:
            await asyncio.sleep(wait_s)
            try:
                await asyncio.to_thread(self.runner.replay, golden)
            except Exception as error:  # noqa: BLE001 - whatever the runtime raises, it is its third
                problem = error
            else:
                return
        self._on_loss(EngineLost(f"model {self.model.name} fails even on its golden image: {problem}"))

    def _cached(self, prepared: Prepared) -> Logits | None:
        if prepared.digest is None or self._cache is None or not self._cache.size:
            return None
        logits = self._cache.find(prepared.digest)
        self.metrics.cached(logits is not None)
        if logits is not None:
            self.metrics.answered(prepared.pixels[np.newaxis], logits[np.newaxis])
        return logits

    def _keep(self, digest: str | None, logits: Logits) -> None:
        if digest is not None and self._cache is not None and self.shares:  # a spot check may have failed meanwhile
            self._cache.keep(digest, logits)
