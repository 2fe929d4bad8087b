"""How many items are let in at once, how fast they go, and when to come again. Knows no item, queue or lane."""

import math
from collections.abc import Callable

from service.errors import QueueFull

MEMORY = 0.9  # share of the old value in the running mean of seconds per item: about the last ten batches count
MAX_RETRY_AFTER_S = 60


class Admission:
    """Counts items that were let in and are not answered yet; `lanes` work on them at the same time."""

    def __init__(self, limit: int, lanes: int, on_empty: Callable[[], None]) -> None:
        self.on_empty = on_empty
        self._limit = limit
        self._lanes = lanes
        self._seconds_per_item = 0.0
        self.count = 0

    @property
    def pace_s(self) -> float:
        """What the lanes need for one item, all together, seconds; 0 before any has run."""
        return self._seconds_per_item / self._lanes

    def check(self, count: int) -> None:
        """Raise QueueFull when `count` more are too many."""
        if self.count + count > self._limit:
            raise QueueFull(
                f"{self.count} images are waiting, the limit is {self._limit}", retry_after_s=self.retry_after_s()
            )

    def retry_after_s(self) -> int:
        """Return how long today's backlog takes at the measured rate, in whole seconds."""
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self.count * self.pace_s)))

    def learn(self, seconds_per_item: float) -> None:
        """Take a run of one lane into account."""
        old = self._seconds_per_item or seconds_per_item
        self._seconds_per_item = MEMORY * old + (1 - MEMORY) * seconds_per_item


class Admitted:
    """Room for `count` items while the context is open. Entering raises QueueFull at once."""

    __slots__ = ("_admission", "_count")

    def __init__(self, admission: Admission, count: int) -> None:
        self._admission = admission
        self._count = count

    def __enter__(self) -> None:
        self._admission.check(self._count)
        self._admission.count += self._count

    def __exit__(self, *_: object) -> None:
        self._admission.count -= self._count
        if self._admission.count == 0:
            self._admission.on_empty()
