"""One model with its queue: an image's way from bytes to logits, replays, receipts, spot checks. Knows no HTTP."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.batching import Batcher
from service.errors import DeadlineExceeded, InferenceFailed, MalformedRequest, ServiceError
from service.independence.certificate import Certificate
from service.independence.receipts import Receipt, logits_digest, pixels_digest
from service.independence.spotcheck import SpotCheck
from service.metrics import ModelMetrics
from service.preprocessing import Accepted, decode
from service.repository import Model
from service.running import Job, Logits, Pixels, Runner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """What the model saw, uint8 (height, width, channels), and what it said, float32 (classes,)."""

    pixels: NDArray[np.uint8]
    logits: NDArray[np.float32]


Outcome = Answered | ServiceError


class Classifier:
    """One model with its queue."""

    def __init__(
        self,
        model: Model,
        runner: Runner,
        batcher: Batcher[Job, Logits],
        decoders: ThreadPoolExecutor,
        accepted: Accepted,
        metrics: ModelMetrics,
        certificate: Certificate | None,
        spot_check: SpotCheck,
    ) -> None:
        self.model = model
        self.runner = runner
        self.metrics = metrics
        self._certificate = certificate
        self._batcher = batcher
        self._decoders = decoders
        self._accepted = accepted
        self._spot_check = spot_check

    @property
    def certificate(self) -> Certificate | None:
        """The certificate, a refusal included, or None: without one, or once the reference was seen to change."""
        return None if self.runner.is_refuted else self._certificate

    def check_receipts(self) -> None:
        """Raise MalformedRequest where answers have no receipts: before an image is run for one."""
        self._certified()

    def check_room(self) -> None:
        """Raise QueueFull or NotReady when not even one image would be let in: before a body is read for nothing."""
        self._batcher.check_room(1)

    async def classify(
        self, images: Sequence[bytes] | Sequence[Pixels], *, deadline: float, is_replay: bool = False
    ) -> list[Outcome]:
        """Return for each image what the model saw and said, or the error that is its own; the others go untouched.

        An image is a file, or pixels as the model wants them, uint8 (height, width, channels). `deadline` is a time
        of `time.monotonic`, in seconds; `is_replay` runs each alone at the reference shape.
        Raises QueueFull or NotReady for all of them.
        """
        with self._batcher.admit(len(images)):
            return list(await asyncio.gather(*(self._classify_one(data, deadline, is_replay) for data in images)))

    def receipt(self, answered: Answered, key: bytes | None) -> Receipt:
        """Return an answer's receipt, signed where there is a key. Raises MalformedRequest without a certificate."""
        certificate, answer_digest = self._certified()
        return Receipt(
            model=self.model.name,
            version=self.model.version,
            form=self.model.form,
            model_digest=self.model.digest,
            certificate=certificate.digest,
            answer_digest=answer_digest,
            pixels=pixels_digest(answered.pixels),
            logits=logits_digest(answered.logits),
        ).signed(key)

    def _certified(self) -> tuple[Certificate, str]:
        certificate = self.certificate
        if certificate is None or certificate.answer_digest is None:
            raise MalformedRequest(f"model {self.model.name} has no certificate, so its answers have no receipts")
        return certificate, certificate.answer_digest

    async def _classify_one(self, encoded: bytes | Pixels, deadline: float, is_replay: bool) -> Outcome:  # noqa: FBT001 - one caller
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                pixels = await loop.run_in_executor(self._decoders, self._decode, encoded, deadline)
            logits = await self._batcher.submit(Job(pixels, is_replay), deadline=deadline)
        except TimeoutError:
            return DeadlineExceeded("the deadline passed before the image was decoded")
        except InferenceFailed as error:
            logger.error("%s: %s", error, error.__cause__)
            return error
        except ServiceError as error:
            return error
        except Exception:  # a lone surprise must neither fail its neighbours nor outlive their admission
            logger.exception("an image failed in a way that nobody foresaw")
            return InferenceFailed("the service failed on this image; its log says why")
        if not is_replay:
            self._spot_check.offer(pixels, logits)
        return Answered(pixels, logits)

    def _decode(self, encoded: bytes | Pixels, deadline: float) -> Pixels:
        if time.monotonic() >= deadline:  # it waited for a thread until nobody waited for it
            raise DeadlineExceeded("the deadline passed before the image was decoded")
        if not isinstance(encoded, bytes):
            return encoded
        with self.metrics.timed("decode"):
            return decode(encoded, self.model.manifest.preprocessing, self._accepted)
