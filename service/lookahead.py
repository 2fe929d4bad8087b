"""Who is prepared next: images are decoded only as far ahead as the lanes can follow. Knows no image and no HTTP.

    stand in line, in the queue's order ── a turn, while few are prepared or being so ── the queue ── a lane

Preparing competes with the runs for cores: of a crowd that is prepared as a whole, nearly all are late. Who would be
answered too late is told so while he stands in line, before he costs anything, and not all at the same moment.
"""

import asyncio
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from service.errors import DeadlineExceeded
from service.queueing import OLDEST_EVERY, Awaiting, Pending, Priority, PriorityQueue
from service.wording import counted

TURNS_KEPT = 64  # the pace is that of about the last eight full batches
FEWEST_TURNS = 8  # fewer tell no pace
FEWEST_S = 0.25  # nor does less time: while a crowd arrives, its bodies slow everything down
REMEMBERED = 16  # answers whose way from turn to end is remembered
HOPE = 2.0  # who stands so many times further back than the line will move is too late: those in front may leave
SHED_EVERY_S = 0.02


class Watcher(Protocol):
    """Told what happens, for metrics."""

    def dropped(self, reason: str) -> None:
        """A caller's item was not run for him: "cancelled" or "deadline"."""


class Observer(Watcher, Protocol):
    """Told what happens, for metrics."""

    def ran(self, size: int, queue_s: Sequence[float], run_s: float) -> None:
        """`size` items ran together for `run_s` seconds, after each had waited its `queue_s`."""

    def shared(self) -> None:
        """A caller joined an item that was in flight already."""


@dataclass(slots=True, eq=False)
class Turn:
    """Leave to prepare one item; `given_at` is a time of the batcher's clock, `waited_s` the time in line, seconds."""

    given_at: float
    waited_s: float


class Lookahead:
    """Gives turns while fewer than `ahead()` items are `prepared()` or in preparation. For one event loop."""

    def __init__(
        self,
        ahead: Callable[[], int],
        prepared: Callable[[], int],
        run_pace_s: Callable[[], float],
        observer: Watcher,
        clock: Callable[[], float],
    ) -> None:
        self._ahead = ahead
        self._prepared = prepared
        self._run_pace_s = run_pace_s  # what the lanes need for one item, all together, seconds
        self._observer = observer
        self._clock = clock
        self._line: PriorityQueue[None, Turn] = PriorityQueue()
        self._preparing = 0
        self._given: deque[float] = deque(maxlen=TURNS_KEPT)  # when turns were given since the line formed
        self._ways_s: deque[float] = deque(maxlen=REMEMBERED)  # from turn to answer
        self._shed_at = 0.0

    def __len__(self) -> int:
        return len(self._line)

    async def turn(self, *, deadline: float, priority: Priority) -> Turn:
        """Wait for a turn; `end` is the caller's duty. `deadline` is a time of the clock, seconds.

        Raises DeadlineExceeded when it passes, or as soon as it cannot be kept.
        """
        if not self._line and self._has_room:
            self._preparing += 1
            return Turn(self._clock(), 0.0)
        return await self._stand_in_line(deadline, priority)

    def end(self) -> None:
        """Say that an item is prepared and in the queue, or will never be."""
        self._preparing -= 1
        if self._line:
            asyncio.get_running_loop().call_soon(self.advance)  # once it counts as prepared

    def advance(self) -> None:
        """Give turns to those who stand first, as many as there is room for."""
        if self._line:
            now = self._clock()
            if now >= self._shed_at + SHED_EVERY_S:
                self._shed(now)
            while self._line and self._has_room:
                self._give(self._line.pop(), now)

    def learn(self, way_s: float) -> None:
        """Remember how long it took from a turn to the answer."""
        self._ways_s.append(way_s)

    def fail(self, reason: str) -> None:
        """Give everybody in line an error with this reason."""
        self._line.fail(reason)

    @property
    def _has_room(self) -> bool:
        return self._preparing + self._prepared() < self._ahead()

    async def _stand_in_line(self, deadline: float, priority: Priority) -> Turn:
        now = self._clock()
        if not self._line:
            self._given.clear()
            self._given.append(now)  # no turn, but the moment from which they are counted
        pending: Pending[None, Turn] = Pending(None, None, now, priority)
        waiter: Awaiting[Turn] = Awaiting(deadline, deadline - now, partial(self._left, pending))
        pending.waiters.append(waiter)
        self._line.put(pending)
        try:
            return await waiter.wait()
        except asyncio.CancelledError:
            if not waiter.has_left and waiter.future.exception() is None:  # given a turn in the same moment
                self._observer.dropped("cancelled")
                self.end()
            raise

    def _left(self, pending: Pending[None, Turn], reason: str) -> None:
        if pending.is_queued:
            self._line.remove(pending)
        self._observer.dropped(reason)

    def _give(self, pending: Pending[None, Turn], now: float) -> None:
        if pending.expire(now):  # its timer is late, for the event loop is busy
            self._observer.dropped("deadline")
        if not pending.is_wanted:  # or has left, and says so when the loop comes to it
            return
        self._given.append(now)
        self._preparing += 1
        pending.tell(Turn(now, now - pending.queued_at))

    def _shed(self, now: float) -> None:
        """Tell those who can no longer be answered in time, by the pace of the line and the way after it."""
        self._shed_at = now
        if self._preparing + self._prepared() == 0:  # nothing is before them but what was measured once
            return
        seconds_per_turn, way_s = self._pace_s(now), statistics.median(self._ways_s) if self._ways_s else 0.0
        by_age = sorted(self._line, key=lambda one: one.queued_at)
        turn_as_oldest = {pending: OLDEST_EVERY * rank for rank, pending in enumerate(by_age, start=1)}
        before = 0
        for pending in filter(lambda one: one.is_wanted, list(self._line)):
            turns = min(before, turn_as_oldest[pending])
            if now + turns * seconds_per_turn / HOPE + way_s > pending.waiters[0].deadline:
                self._line.remove(pending)
                self._observer.dropped("deadline")
                pending.tell(
                    DeadlineExceeded(f"the answer would be too late: before this image come {counted(turns, 'other')}")
                )
            else:
                before += 1

    def _pace_s(self, now: float) -> float:
        """Return how long the line takes for one turn at best, seconds; 0 while that is not known.

        It moves faster than the lanes run where answers are shared or kept; slower while a crowd arrives.
        """
        turns, since_s = len(self._given) - 1, now - self._given[0]
        return min(since_s / turns, self._run_pace_s()) if turns >= FEWEST_TURNS and since_s >= FEWEST_S else 0.0
