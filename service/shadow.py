"""A shadow: another version that gets the same images off the hot path, and whose answers are compared, never given.

Both sides are batch independent, so a difference is the model's, not the load's: there is no noise to tell it from.
Under load nothing is compared; the shadow gives way.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from service.classifier import Answered, Classifier
from service.errors import FoldserveError
from service.model_metrics import ModelMetrics

WAITING = 16
LARGEST_BYTES = 4 * 2**20  # an encoded image that waits; only where the two versions see other pixels
TIMEOUT_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Comparison:
    """What came of it so far: images by outcome; label flips; the largest logit difference of each class."""

    outcomes: Counter[str] = field(default_factory=Counter)
    flips: Counter[tuple[str, str]] = field(default_factory=Counter)
    differences: dict[str, float] = field(default_factory=dict)


class Shadow:
    """Compares a shadow with the stable version. Use as an async context manager."""

    def __init__(
        self, stable: Classifier, shadow: Classifier, metrics: ModelMetrics, is_busy: Callable[[], bool]
    ) -> None:
        self._labels = stable.model.manifest.labels
        self._others = shadow.model.manifest.labels
        self._common = [label for label in self._labels if label in set(self._others)]
        self._columns = [self._labels.index(label) for label in self._common]
        self._other_columns = [self._others.index(label) for label in self._common]
        self._sees_same = stable.model.manifest.preprocessing == shadow.model.manifest.preprocessing
        self._shadow = shadow
        self._metrics = metrics
        self._is_busy = is_busy
        self._waiting: asyncio.Queue[tuple[bytes, Answered]] = asyncio.Queue(WAITING)
        self._task: asyncio.Task[None] | None = None
        self.comparison = Comparison()

    @property
    def version(self) -> int:
        """The shadow's version."""
        return self._shadow.model.version

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def offer(self, encoded: bytes, answered: Answered) -> None:
        """Take an answer in to be compared, or let it go where there is better to do. Never waits."""
        kept = b"" if self._sees_same else encoded
        if self._is_busy() or self._waiting.full() or len(kept) > LARGEST_BYTES:
            self._count("dropped")
        else:
            self._waiting.put_nowait((kept, answered))

    async def _work(self) -> None:
        while True:
            encoded, answered = await self._waiting.get()
            if self._is_busy():
                self._count("dropped")
                continue
            try:
                self._compare(answered.logits, await self._answer(encoded, answered))
            except FoldserveError as error:
                logger.warning("shadow version %d gave no answer: %s", self.version, error)
                self._count("failed")

    async def _answer(self, encoded: bytes, answered: Answered) -> NDArray[np.float32]:
        deadline = time.monotonic() + TIMEOUT_S
        if self._sees_same:
            return await self._shadow.answer(answered.pixels, deadline=deadline, priority="low")
        (outcome,) = await self._shadow.classify([encoded], deadline=deadline, priority="low")
        if not isinstance(outcome, Answered):
            raise outcome
        return outcome.logits

    def _compare(self, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
        label, other = self._labels[int(ours.argmax())], self._others[int(theirs.argmax())]
        apart = np.abs(ours[self._columns].astype(np.float64) - theirs[self._other_columns]).tolist()
        for name, difference in zip(self._common, apart, strict=True):
            if difference > self.comparison.differences.get(name, -1.0):
                self.comparison.differences[name] = difference
                self._metrics.shadow_difference(self.version, name, difference)
        if label != other:
            self.comparison.flips[label, other] += 1
            self._count("flipped")
        else:
            is_same = self._labels == self._others and np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))
            self._count("same bits" if is_same else "same label")

    def _count(self, outcome: str) -> None:
        self.comparison.outcomes[outcome] += 1
        self._metrics.shadow(self.version, outcome)
