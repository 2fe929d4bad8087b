"""What each lane runs, and the batch that it may have at hand while it does. Knows no item, queue or thread."""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Sleepers:
    """Lanes that have nothing to run, the one that has waited longest first."""

    def __init__(self) -> None:
        self._asleep: deque[asyncio.Future[None]] = deque()

    def __bool__(self) -> bool:
        """True while one sleeps."""
        return bool(self._asleep)

    async def sleep(self) -> None:
        """Wait to be woken."""
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asleep.append(sleeper)
        await sleeper

    def wake_one(self) -> None:
        """Wake the first, if there is one."""
        if self._asleep:
            self._asleep.popleft().set_result(None)

    def wake_all(self) -> None:
        """Wake them all."""
        while self._asleep:
            self.wake_one()


class Lanes:
    """So many lanes, each with at most one batch at hand, made up once `enough` items wait; None: with none.

    Fewer wait for an idle lane: more may come until then.
    """

    def __init__(self, count: int, enough: int | None) -> None:
        self._count = count
        self._enough = enough
        self._under_way: list[Sequence[object]] = []  # in the order in which they were made up

    @property
    def takers(self) -> int:
        """How many batches there may be at the same time."""
        return self._count if self._enough is None else 2 * self._count

    @property
    def idle(self) -> int:
        """How many lanes share what waits: those that run nothing, or the one whose next batch is made up."""
        return max(1, self._count - len(self._under_way))

    @property
    def at_hand(self) -> int:
        """How many items are in batches that wait for the run before them to end."""
        return sum(map(len, self._under_way[self._count :]))

    def can_take(self, waiting: int) -> bool:
        """True where a batch may be made up of so many waiting items."""
        return waiting > 0 and (
            len(self._under_way) < self._count or (self._enough is not None and waiting >= self._enough)
        )

    @contextmanager
    def holding(self, batch: Sequence[object]) -> Iterator[None]:
        """Count a batch as under way until the block ends."""
        self._under_way.append(batch)
        try:
            yield
        finally:
            self._under_way.remove(batch)
