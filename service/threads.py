"""Threads that work for an event loop, one piece of work each at a time.

`concurrent.futures` does the same with two futures, a condition and a semaphore for each piece.
"""

import asyncio
import atexit
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Work = TypeVar("Work")
Done = TypeVar("Done")

_RUNNING: dict[threading.Thread, SimpleQueue[Any]] = {}  # and what each waits for


class Threads(Generic[Work, Done]):
    """`count` threads that call `do`; for the event loop that runs when they are made.

    `niceness`: how much nicer than who makes them, 0 to 19 (setpriority(2)), where a thread can be.
    """

    def __init__(self, count: int, name: str, do: Callable[[Work], Done], niceness: int = 0) -> None:
        self._count = count
        self._do = do
        self._niceness = niceness
        self._loop = asyncio.get_running_loop()
        self._waiting: SimpleQueue[tuple[Work, asyncio.Future[Done]] | None] = SimpleQueue()
        _end_with_the_interpreter()
        try:
            for number in range(count):
                threading.Thread(target=self._work, name=f"{name}_{number}", daemon=True).start()
        except RuntimeError:  # the system has no more of them
            self.shutdown()
            raise

    def run(self, work: Work) -> asyncio.Future[Done]:
        """Return what `do` gives for `work`, or raises, once a thread is free."""
        future: asyncio.Future[Done] = self._loop.create_future()
        self._waiting.put((work, future))
        return future

    def shutdown(self) -> None:
        """Let the threads end after what they were given; do not wait for it."""
        for _ in range(self._count):
            self._waiting.put(None)

    def _work(self) -> None:
        _be_nicer_by(self._niceness)
        own = threading.current_thread()
        _RUNNING[own] = self._waiting
        try:
            self._work_on()
        finally:
            del _RUNNING[own]

    def _work_on(self) -> None:
        while (given := self._waiting.get()) is not None:
            outcome: Done | BaseException
            try:
                outcome = self._do(given[0])
            except BaseException as error:  # noqa: BLE001 - it is raised where the work is waited for
                outcome = error
            try:
                self._loop.call_soon_threadsafe(_settle, given[1], outcome)
            except RuntimeError:  # the loop is closed, and nobody waits any more
                return
            del given, outcome  # which would be held until there is more work


def _be_nicer_by(niceness: int) -> None:
    if sys.platform == "linux":  # elsewhere all of the process would be
        with contextlib.suppress(OSError):  # a sandbox forbids it
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + niceness)


@functools.cache
def _end_with_the_interpreter() -> None:
    atexit.register(_end_all)


def _end_all() -> None:
    """Let what was not shut down end by itself: in a library's code, the end of the interpreter may crash a thread."""
    running = dict(_RUNNING)
    for waiting in running.values():
        waiting.put(None)
    for thread in running:
        thread.join()


def _settle(future: "asyncio.Future[Done]", outcome: Done | BaseException) -> None:
    if future.done():  # cancelled, for nobody waits any more
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
