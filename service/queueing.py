"""What waits for a lane, and in which order it is taken. Pure but for futures; knows no lane, image or clock.

The rule: high before normal before low, within a class the first that came. Every eighth item taken is the one that
has waited longest, of whatever class: so low keeps an eighth of the rate under any load, and never starves.
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar, get_args

from service.errors import DeadlineExceeded, InferenceFailed

Item = TypeVar("Item")
Result = TypeVar("Result")

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
OLDEST_EVERY = 8
LATE = "the deadline passed before the image could be answered"


def fair_share(waiting: int, idle_lanes: int) -> int:
    """Divide what waits among the idle lanes, so that none takes all while another idles."""
    return math.ceil(waiting / idle_lanes)


@dataclass(frozen=True, slots=True, eq=False)
class Waiter(Generic[Result]):
    """One caller, who may leave by himself; `deadline` is a time of the batcher's clock, in seconds."""

    future: asyncio.Future[Result]
    deadline: float

    async def outcome(self, now: float, on_left: Callable[[str], None]) -> Result:
        """Wait for the result; `now` is the batcher's time. Raises DeadlineExceeded at the deadline.

        `on_left` hears why the caller has left without one: "deadline" or "cancelled".
        """
        timer = asyncio.get_running_loop().call_later(
            self.deadline - now, self._expire, on_left
        )  # a third of a timeout
        try:
            return await self.future
        except asyncio.CancelledError:
            if self.future.cancelled():  # else its deadline or its answer came first
                on_left("cancelled")
            raise
        finally:
            timer.cancel()

    def _expire(self, on_left: Callable[[str], None]) -> None:
        if not self.future.done():
            self.future.set_exception(DeadlineExceeded(LATE))
            on_left("deadline")


@dataclass(slots=True, eq=False)
class Pending(Generic[Item, Result]):
    """An item with all who wait for its result; `queued_at` is a time of the batcher's clock, in seconds."""

    item: Item
    key: Hashable
    queued_at: float
    priority: Priority
    waiters: list[Waiter[Result]] = field(default_factory=list)
    is_queued: bool = False

    @property
    def is_wanted(self) -> bool:
        """True while somebody waits for it."""
        return any(not waiter.future.done() for waiter in self.waiters)

    def expire(self, now: float) -> int:
        """Tell those whose deadline has passed; return how many they were."""
        late = [one for one in self.waiters if one.deadline <= now and not one.future.done()]
        for waiter in late:
            waiter.future.set_exception(DeadlineExceeded(LATE))
        return len(late)

    def settle(self, result: Result) -> None:
        """Give everybody who still waits the result."""
        for waiter in self.waiters:
            if not waiter.future.done():
                waiter.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Give everybody who still waits the error."""
        for waiter in self.waiters:
            if not waiter.future.done():
                waiter.future.set_exception(error)


class PriorityQueue(Generic[Item, Result]):
    """Items by the rule above; any can be taken out, so that no dead one holds memory or counts as waiting."""

    def __init__(self) -> None:
        self._classes: dict[Priority, OrderedDict[Pending[Item, Result], None]] = {
            priority: OrderedDict() for priority in PRIORITIES
        }
        self._taken = 0

    def __len__(self) -> int:
        return sum(map(len, self._classes.values()))

    def __iter__(self) -> Iterator[Pending[Item, Result]]:
        for waiting in self._classes.values():
            yield from waiting

    def put(self, pending: Pending[Item, Result]) -> None:
        """Queue an item at the end of its class."""
        self._classes[pending.priority][pending] = None
        pending.is_queued = True

    def promote(self, pending: Pending[Item, Result], priority: Priority) -> None:
        """Move an item to the end of a higher class; a lower one changes nothing, nor does one that is not queued."""
        if pending.is_queued and PRIORITIES.index(priority) < PRIORITIES.index(pending.priority):
            self.remove(pending)
            pending.priority = priority
            self.put(pending)

    def remove(self, pending: Pending[Item, Result]) -> None:
        """Take an item out. Raises KeyError when it is not queued."""
        del self._classes[pending.priority][pending]
        pending.is_queued = False

    def pop(self) -> Pending[Item, Result]:
        """Take out the next item. Raises IndexError when none waits."""
        firsts = [next(iter(waiting)) for waiting in self._classes.values() if waiting]
        if not firsts:
            raise IndexError("nothing waits")
        self._taken += 1
        is_turn_of_oldest = self._taken % OLDEST_EVERY == 0
        pending = min(firsts, key=lambda one: one.queued_at) if is_turn_of_oldest else firsts[0]
        self.remove(pending)
        return pending

    def fail(self, reason: str) -> None:
        """Take everything out, and give everybody who waits an error with this reason."""
        for pending in list(self):
            self.remove(pending)
            pending.fail(InferenceFailed(reason))
