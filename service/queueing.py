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


@dataclass(slots=True, eq=False)
class Waiter(Generic[Result]):
    """One caller, who may leave by himself; `deadline` is a time of the batcher's clock, in seconds.

    As a context it is open while he waits for `future`, which gets DeadlineExceeded at the deadline; `on_left` hears
    why he has left without a result: "deadline" or "cancelled". `waits_s` is how far off the deadline is, in seconds.
    """

    future: asyncio.Future[Result]
    deadline: float
    waits_s: float
    on_left: Callable[[str], None]
    _timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> asyncio.Future[Result]:
        loop = self.future.get_loop()
        self._timer = loop.call_later(self.waits_s, self._expire)  # a third of what a timeout costs
        return self.future

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._timer is not None
        self._timer.cancel()
        self._timer = None
        if kind is asyncio.CancelledError and self.future.cancelled():  # else its deadline or its answer came first
            self.on_left("cancelled")

    def _expire(self) -> None:
        if not self.future.done():
            self.future.set_exception(DeadlineExceeded(LATE))
            self.on_left("deadline")


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
        return any([not waiter.future.done() for waiter in self.waiters])  # noqa: C419 - of one, mostly

    def expire(self, now: float) -> int:
        """Tell those whose deadline has passed; return how many they were."""
        late = 0
        for waiter in self.waiters:
            if waiter.deadline <= now and not waiter.future.done():
                waiter.future.set_exception(DeadlineExceeded(LATE))
                late += 1
        return late

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
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Pending[Item, Result]]:
        for waiting in self._classes.values():
            yield from waiting

    def put(self, pending: Pending[Item, Result]) -> None:
        """Queue an item at the end of its class."""
        self._classes[pending.priority][pending] = None
        self._count += 1
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
        self._count -= 1
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
