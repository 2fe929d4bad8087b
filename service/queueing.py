"""What waits for a lane, and in which order it is taken. Pure but for futures; knows no lane, image or clock.

The rule: high before normal before low, within a class the first that came. Every eighth item taken is the one that
has waited longest, of whatever class: so low keeps an eighth of the rate under any load, and never starves.
"""

import asyncio
import math
from abc import ABC, abstractmethod
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


class Waiter(ABC, Generic[Result]):
    """One caller, who is told once: of a result, or of an error. He may leave before.

    `deadline` is a time of the batcher's clock, `waits_s` seconds off; there he is told DeadlineExceeded. `on_left`
    hears why he goes without a result: "deadline" or "cancelled". After that nothing leads from here to the item, which
    leads here: in a cycle, images would stay in memory until a collection.
    """

    __slots__ = ("_on_left", "_timer", "deadline")

    def __init__(self, deadline: float, waits_s: float, on_left: Callable[[str], None]) -> None:
        self.deadline = deadline
        self._on_left = on_left
        self._timer = asyncio.get_running_loop().call_later(waits_s, self._expire)  # a third of what a timeout costs

    @property
    @abstractmethod
    def is_waiting(self) -> bool:
        """True until he is told, or has left."""

    @property
    @abstractmethod
    def has_left(self) -> bool:
        """True where he left by himself."""

    @abstractmethod
    def tell(self, outcome: Result | Exception) -> None:
        """Tell him, who is waiting."""

    def _expire(self) -> None:
        if self.is_waiting:
            on_left = self._on_left
            self.tell(DeadlineExceeded(LATE))
            on_left("deadline")

    def _end(self) -> None:
        self._timer.cancel()
        self._on_left = _tell_nobody


class Awaiting(Waiter[Result]):
    """A task that awaits `wait`; to cancel it is to leave."""

    __slots__ = ("future",)

    def __init__(self, deadline: float, waits_s: float, on_left: Callable[[str], None]) -> None:
        super().__init__(deadline, waits_s, on_left)
        self.future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

    @property
    def is_waiting(self) -> bool:
        """True until the future has its result, or was cancelled."""
        return not self.future.done()

    @property
    def has_left(self) -> bool:
        """True where the task was cancelled before."""
        return self.future.cancelled()

    def tell(self, outcome: Result | Exception) -> None:
        """Let `wait` return the result, or raise the error."""
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)

    async def wait(self) -> Result:
        """Return the result, or raise the error."""
        try:
            return await self.future
        finally:
            if self.has_left:  # else a deadline or an answer came first
                self._on_left("cancelled")
            self._end()


class Listening(Waiter[Result]):
    """A caller without a task of his own: `hear` is called."""

    __slots__ = ("_has_left", "_hear", "_is_waiting")

    def __init__(
        self,
        hear: Callable[[Result | Exception], None],
        deadline: float,
        waits_s: float,
        on_left: Callable[[str], None],
    ) -> None:
        super().__init__(deadline, waits_s, on_left)
        self._hear = hear
        self._is_waiting = True
        self._has_left = False

    @property
    def is_waiting(self) -> bool:
        """True until `hear` is called, or he has left."""
        return self._is_waiting

    @property
    def has_left(self) -> bool:
        """True where `leave` was called in time."""
        return self._has_left

    def tell(self, outcome: Result | Exception) -> None:
        """Call `hear`."""
        hear = self._hear
        self._end()
        hear(outcome)

    def leave(self) -> None:
        """Wait no more, unheard."""
        if self._is_waiting:
            on_left, self._has_left = self._on_left, True
            self._end()
            on_left("cancelled")

    def _end(self) -> None:
        self._is_waiting = False
        self._hear = _tell_nobody
        super()._end()


def _tell_nobody(_: object) -> None:
    pass


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
        for waiter in self.waiters:  # noqa: SIM110 - of one, mostly, and asked three times of each item
            if waiter.is_waiting:
                return True
        return False

    @property
    def is_given_up(self) -> bool:
        """True where all who waited left by themselves."""
        return all(waiter.has_left for waiter in self.waiters)

    def expire(self, now: float) -> int:
        """Tell those whose deadline has passed; return how many they were."""
        late = 0
        for waiter in self.waiters:
            if waiter.deadline <= now and waiter.is_waiting:
                waiter.tell(DeadlineExceeded(LATE))
                late += 1
        return late

    def tell(self, outcome: Result | Exception) -> None:
        """Give everybody who still waits the result, or the error."""
        for waiter in self.waiters:
            if waiter.is_waiting:
                waiter.tell(outcome)


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
            pending.tell(InferenceFailed(reason))
