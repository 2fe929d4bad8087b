"""Admission, queue and batch forming. Knows no image, no HTTP, no ONNX: items, and a function that runs a batch.

    admit ── turn ── submit ── queue ── a free lane takes its share ── run_batch in a thread ── each caller

A batch forms while every lane is busy; an idle lane never waits for company unless told to. Where runs are short, a
busy lane has a batch at hand, and need not wait for the event loop between the two. An item whose callers have
all gone or whose deadlines have passed is dropped before it costs a run. Items of one key are run once for all who ask
while one is in flight. A batch that fails is run again item by item, so that only the culprit fails. Shutdown drains.
"""

import asyncio
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Generic, Self

from service.admission import Admission, Admitted
from service.batch_runs import Ran, lane_threads
from service.errors import InferenceFailed, NotReady
from service.lanes import Lanes, Sleepers
from service.lookahead import Lookahead, Observer, Turn
from service.queueing import Awaiting, Item, Listening, Pending, Priority, PriorityQueue, Result, fair_share
from service.threads import Threads

MANY = 10**6  # more than any queue holds
ENDED = "the batcher ended; see the log"


class Batcher(Generic[Item, Result]):
    """Runs items in batches on several lanes. Use as an async context manager; leaving it drains."""

    def __init__(
        self,
        run_batch: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        observer: Observer,
        max_batch_size: int,
        max_queue_size: int,
        lanes: int = 1,
        max_queue_delay_ms: float = 0.0,
        take: Callable[[int, int], int] = fair_share,
        ahead: Callable[[], int] = lambda: MANY,
        enough: int | None = None,
        on_death: Callable[[BaseException], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_batch = run_batch
        self._observer = observer
        self._max_batch_size = max_batch_size
        self._max_queue_delay_s = max_queue_delay_ms / 1000
        self._threads = lanes
        self.lanes = Lanes(lanes, enough)
        self.admission = Admission(max_queue_size, lanes, self._emptied)
        self._take_of = take  # of so many waiting, with so many idle lanes, how many does one lane run next?
        self._on_death = on_death
        self._clock = clock  # not the event loop's, which may tick in whole milliseconds
        self._queue: PriorityQueue[Item, Result] = PriorityQueue()
        self.lookahead = Lookahead(ahead, lambda: self._prepared, lambda: self.admission.pace_s, observer, clock)
        self._in_flight: dict[Hashable, Pending[Item, Result]] = {}  # by key, until settled
        self._sleepers = Sleepers()
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = 0  # of these
        self._working: Threads[list[Pending[Item, Result]], Ran[Item, Result]] | None = None
        self._draining = False
        self.failure: BaseException | None = None

    async def __aenter__(self) -> Self:
        self._working = lane_threads(self._threads, self._run_batch, self._clock)
        for _ in range(self.lanes.takers):
            task = asyncio.create_task(self._serve_lane())
            task.add_done_callback(self._lane_ended)
            self._tasks.append(task)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._draining = True
        self._sleepers.wake_all()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            if self._working is not None:
                self._working.shutdown()  # no lane is left that could use them

    @property
    def depth(self) -> int:
        """Items that wait for a lane, or for their turn to be prepared for one."""
        return self._prepared + len(self.lookahead)

    @property
    def _prepared(self) -> int:
        return len(self._queue) + self.lanes.at_hand

    @property
    def admitted(self) -> int:
        """Items that were let in and are not answered yet."""
        return self.admission.count

    def admit(self, count: int) -> Admitted:
        """Return a context that holds room for `count` items while they are prepared, queued and run.

        Raises NotReady; entering it raises QueueFull at once.
        """
        self._check_life()
        return Admitted(self.admission, count)

    def check_room(self, count: int) -> None:
        """Raise QueueFull or NotReady when `count` items would not be let in now."""
        self._check_life()
        self.admission.check(count)

    def _check_life(self) -> None:
        if self._draining or self.failure is not None:
            raise NotReady("the service is shutting down", retry_after_s=1)

    def _emptied(self) -> None:
        if self._draining:
            self._sleepers.wake_all()

    async def submit(
        self,
        item: Item,
        *,
        deadline: float,
        priority: Priority = "normal",
        key: Hashable = None,
        turn: Turn | None = None,
    ) -> Result:
        """Queue an item and return its result; `turn` is the turn of `lookahead` that it was prepared in, if any.

        `deadline` is a time of the batcher's clock, in seconds. Items of one `key` have one result: while one is in
        flight it serves all who ask, each with his own deadline, and it goes with the highest of their priorities.
        Raises DeadlineExceeded when it passes, InferenceFailed when the item fails on its own.
        """
        pending, now = self._queue_up(item, priority, key, 0.0 if turn is None else turn.waited_s)
        waiter: Awaiting[Result] = Awaiting(deadline, deadline - now, partial(self._left, pending))
        pending.waiters.append(waiter)
        result = await waiter.wait()
        if turn is not None:
            self.lookahead.learn(self._clock() - turn.given_at)
        return result

    def begin(
        self,
        item: Item,
        hear: Callable[[Result | Exception], None],
        *,
        deadline: float,
        priority: Priority = "normal",
        key: Hashable = None,
    ) -> Listening[Result]:
        """Do as `submit` does for a caller without a task: `hear` gets the result, or what `submit` would raise.

        It is called in between two runs of a lane, and must not raise. Raises NotReady itself.
        """
        pending, now = self._queue_up(item, priority, key, 0.0)
        waiter: Listening[Result] = Listening(hear, deadline, deadline - now, partial(self._left, pending))
        pending.waiters.append(waiter)
        return waiter

    def _queue_up(
        self, item: Item, priority: Priority, key: Hashable, waited_s: float
    ) -> tuple[Pending[Item, Result], float]:
        if self.failure is not None or self._ended == len(self._tasks):
            raise NotReady("the service is shutting down", retry_after_s=1)
        now = self._clock()
        return self._join(key, priority) or self._enqueue(item, priority, key, now - waited_s), now

    def _join(self, key: Hashable, priority: Priority) -> Pending[Item, Result] | None:
        pending = None if key is None else self._in_flight.get(key)
        if pending is not None:
            self._queue.promote(pending, priority)
            self._observer.shared()
        return pending

    def _enqueue(self, item: Item, priority: Priority, key: Hashable, queued_at: float) -> Pending[Item, Result]:
        pending: Pending[Item, Result] = Pending(item, key, queued_at, priority)
        if key is not None:
            self._in_flight[key] = pending
        self._queue.put(pending)
        if self._sleepers and self._can_take:
            self._sleepers.wake_one()
        return pending

    def _left(self, pending: Pending[Item, Result], reason: str) -> None:
        if pending.is_queued:  # one that runs already cannot be called back
            self._observer.dropped(reason)
            if not pending.is_wanted:
                self._queue.remove(pending)
                self._forget(pending)
                self.lookahead.advance()

    def _forget(self, pending: Pending[Item, Result]) -> None:
        if self._in_flight.get(pending.key) is pending:
            del self._in_flight[pending.key]

    @property
    def _is_drained(self) -> bool:
        return self._draining and not self._queue and self.admission.count == 0

    async def _serve_lane(self) -> None:
        while not self._is_drained:
            await self._serve_batch(await self._next_batch())

    async def _serve_batch(self, batch: list[Pending[Item, Result]]) -> None:
        with self.lanes.holding(batch):
            self.lookahead.advance()
            try:
                await self._run(batch)
            except BaseException:
                for one in batch:
                    one.tell(InferenceFailed(ENDED))
                raise
        self.lookahead.advance()  # what was at hand is run now, and too few may wait to be taken

    async def _next_batch(self) -> list[Pending[Item, Result]]:
        while not self._can_take and not self._is_drained:
            await self._sleepers.sleep()
        if self._max_queue_delay_s and len(self._queue) < self._max_batch_size and not self._draining:
            await asyncio.sleep(self._max_queue_delay_s)
        return self._take(self._take_of(len(self._queue), self.lanes.idle)) if self._can_take else []

    @property
    def _can_take(self) -> bool:
        return self.lanes.can_take(len(self._queue))

    def _take(self, share: int) -> list[Pending[Item, Result]]:
        """Return up to `share` living items: idle lanes divide what waits, that none takes all while another idles."""
        batch: list[Pending[Item, Result]] = []
        now = self._clock()
        while self._queue and len(batch) < min(share, self._max_batch_size):
            pending = self._queue.pop()
            if self._is_wanted(pending, now):
                batch.append(pending)
        return batch

    def _is_wanted(self, pending: Pending[Item, Result], now: float) -> bool:
        for _ in range(pending.expire(now)):
            self._observer.dropped("deadline")
        if not pending.is_wanted:
            self._forget(pending)
        return pending.is_wanted

    async def _run(self, batch: list[Pending[Item, Result]]) -> None:
        if not batch:
            return
        assert self._working is not None
        try:
            done = await self._working.run(batch)
        except Exception as error:  # noqa: BLE001 - whatever the model raises belongs to the batch, not to the lane
            await self._run_alone(batch, error)
            return
        if done.ran:
            run_s = self._clock() - done.started
            self._observer.ran(len(done.ran), [done.started - one.queued_at for one in done.ran], run_s)
            self.admission.learn(run_s / len(done.ran))
        for one, result in zip(done.ran, done.results, strict=True):
            self._forget(one)
            one.tell(result)
        if len(done.ran) < len(batch):
            self._sort_out([one for one in batch if one not in done.ran])

    def _sort_out(self, left: Iterable[Pending[Item, Result]]) -> None:
        for one in left:
            if one.is_wanted:  # by somebody who came after its callers had gone
                self._queue.put(one)
                self._sleepers.wake_one()
            else:
                self._drop(one)

    def _drop(self, one: Pending[Item, Result]) -> None:
        self._forget(one)
        self._observer.dropped("cancelled" if one.is_given_up else "deadline")

    async def _run_alone(self, batch: list[Pending[Item, Result]], error: Exception) -> None:
        if len(batch) == 1:
            failure = InferenceFailed("the model failed on this image")
            failure.__cause__ = error
            self._forget(batch[0])
            batch[0].tell(failure)
            return
        for one in batch:
            if not one.is_wanted:
                self._drop(one)
            elif self._is_wanted(one, self._clock()):
                await self._run([one])

    def _lane_ended(self, task: asyncio.Task[None]) -> None:
        self._ended += 1
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        self.failure = error
        self._queue.fail(ENDED)
        self.lookahead.fail(ENDED)
        if self._on_death is not None:
            self._on_death(error)
