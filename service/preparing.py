"""An image's way from bytes to the pixels that its model wants: its turn, its decoding, its digest. Knows no run."""

import math
from dataclasses import dataclass
from time import perf_counter

from service.decoding import Decoders
from service.errors import ServiceError
from service.independence.receipts import pixels_digest
from service.lookahead import Lookahead, Turn
from service.model_metrics import ModelMetrics
from service.preprocessing import Accepted, Hold, Pixels, Preprocessing, decode
from service.queueing import Priority
from service.small_files import QUICK_PIXELS, is_quick
from service.tracing import stage


@dataclass(slots=True, eq=False)
class Prepared:
    """An image ready to be queued: its digest where runs are shared, and the turn that it waited for, if it had to."""

    pixels: Pixels
    digest: str | None
    turn: Turn | None = None


class Preparer:
    """Prepares the images of one model."""

    def __init__(
        self,
        preprocessing: Preprocessing,
        accepted: Accepted,
        decoders: Decoders,
        lookahead: Lookahead,
        metrics: ModelMetrics,
    ) -> None:
        self.decoders = decoders
        self._preprocessing = preprocessing
        self._is_small = math.prod(preprocessing.size) <= QUICK_PIXELS
        self._accepted = accepted
        self._lookahead = lookahead
        self._metrics = metrics

    def at_once(self, image: bytes | Pixels, deadline: float, *, with_digest: bool) -> Prepared | ServiceError | None:
        """Return a lone image prepared, where it is small and needs to wait behind nobody, or what is wrong with it.

        None for any other, which is for `prepare`. Meant for many in a row. `deadline` is a time of `time.monotonic`.
        """
        if not (self._is_small and isinstance(image, bytes) and not self._lookahead and is_quick(image)):
            return None
        started = perf_counter()
        work = self._decode_with_digest if with_digest else self._decode
        try:
            decoded = self.decoders.decode_at_once(work, image, deadline=deadline, observer=self._metrics)
        except ServiceError as error:
            return error
        stage("decode", perf_counter() - started)
        return None if decoded is None else Prepared(*decoded)

    async def prepare(
        self, image: bytes | Pixels, deadline: float, priority: Priority, *, with_digest: bool, is_alone: bool
    ) -> Prepared:
        """Return an image prepared, once it is its turn; `is_alone` where its request has no other.

        Raises DeadlineExceeded, or what is wrong with the image.
        """
        quick = is_alone and self._is_small and isinstance(image, bytes) and is_quick(image)
        is_work = isinstance(image, bytes) and not quick  # many quick ones in a row would hold the event loop together
        turn = None
        if is_work or len(self._lookahead) > 0:  # what costs nothing to prepare waits only behind what does
            turn = await self._lookahead.turn(deadline=deadline, priority=priority)
        try:
            if turn is not None:
                stage("queue", turn.waited_s)
            started = perf_counter()
            pixels, digest = await self._pixels(image, deadline, with_digest=with_digest, is_quick=quick)
        finally:
            if turn is not None:
                self._lookahead.end()
        stage("decode", perf_counter() - started)
        return Prepared(pixels, digest, turn)

    async def _pixels(
        self, image: bytes | Pixels, deadline: float, *, with_digest: bool, is_quick: bool
    ) -> tuple[Pixels, str | None]:
        if not isinstance(image, bytes):
            return image, pixels_digest(image) if with_digest else None
        work = self._decode_with_digest if with_digest else self._decode
        return await self.decoders.decode(work, image, deadline=deadline, observer=self._metrics, is_quick=is_quick)

    def _decode_with_digest(self, encoded: bytes, hold: Hold) -> tuple[Pixels, str | None]:
        pixels = decode(encoded, self._preprocessing, self._accepted, hold)
        return pixels, pixels_digest(pixels)

    def _decode(self, encoded: bytes, hold: Hold) -> tuple[Pixels, str | None]:
        return decode(encoded, self._preprocessing, self._accepted, hold), None
