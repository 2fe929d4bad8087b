"""Re-runs a small share of live answers alone, off the hot path, and compares bits. Knows no web and no queue.

This covers what a probe at load cannot: a machine that changes while it runs. A third run decides which of two
differing answers was wrong.
"""

import contextlib
import logging
import queue
import random
import threading
from collections.abc import Callable
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from service.independence.probe import same_bits
from service.independence.receipts import logits_digest, pixels_digest

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]
Verdict = Literal["agreed", "live answer wrong", "reference unstable"]

LAST_CHECK_S = 5.0
WAITING = 16  # checks that may wait; more are let go, for they are a sample

logger = logging.getLogger(__name__)


class SpotCheck:
    """Checks answers on a thread of its own. Use as a context manager."""

    def __init__(self, replay: Callable[[Pixels], Logits], share: float, on_verdict: Callable[[Verdict], None]) -> None:
        self._replay = replay
        self._share = share
        self._on_verdict = on_verdict
        self._waiting: queue.Queue[tuple[Pixels, Logits] | None] = queue.Queue(WAITING)
        self._choose = random.Random()  # noqa: S311 - which answers are sampled is no secret
        self._thread = threading.Thread(target=self._work, name="spot-check", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._share = 0.0
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=LAST_CHECK_S)
        self._thread.join(LAST_CHECK_S)  # a run that hangs must not hold the process; the thread is a daemon

    def offer(self, pixels: Pixels, logits: Logits) -> None:
        """Take an answer into the sample, by chance. Never waits."""
        if self._share and self._choose.random() < self._share:
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait((pixels, logits))

    def _work(self) -> None:
        while (offered := self._waiting.get()) is not None:
            try:
                self._on_verdict(self._check(*offered))
            except Exception:  # a failing check must not end the checks
                logger.exception("a spot check failed")

    def _check(self, pixels: Pixels, logits: Logits) -> Verdict:
        again = self._replay(pixels)
        if same_bits(again, logits):
            return "agreed"
        verdict: Verdict = "live answer wrong" if same_bits(self._replay(pixels), again) else "reference unstable"
        logger.error(
            "spot check: %s; pixels %s, live logits %s, alone %s",
            *(verdict, pixels_digest(pixels), logits_digest(logits), logits_digest(again)),
        )
        return verdict
