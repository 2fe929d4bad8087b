"""Work that is worth doing only while somebody waits for it.

Our own server says through the scope when a connection closes, and whether a body is here already; any other is asked,
which costs two tasks and two timers.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from service.errors import CallerGone, DeadlineExceeded

Result = TypeVar("Result")

GONE = "the connection closed before there was an answer"
WHEN_GONE = "foldserve.when_gone"  # in the scope: sets what is called when the connection closes; False: it has closed
SINCE_LAST_BYTE = "foldserve.since_last_byte"  # in the scope: gives how long ago the connection last got a byte, s
ARRIVED = "foldserve.arrived"  # in the scope: gives the body where all of it has arrived, else None
WhenGone = Callable[[Callable[[], object] | None], bool]


def arrived_body(request: Request) -> bytes | None:
    """Return the body where all of it has arrived already, without waiting."""
    arrived: Callable[[], bytes | None] | None = request.scope.pop(ARRIVED, None)
    return None if arrived is None else arrived()


def since_last_byte_s(request: Request) -> float:
    """Return how long ago the last byte of a request came, seconds, where the server knows; else 0."""
    since: Callable[[], float] | None = request.scope.get(SINCE_LAST_BYTE)
    return 0.0 if since is None else since()


async def before(deadline: float, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` gives before `deadline`, a time of `time.monotonic` in seconds. Raises DeadlineExceeded."""
    clock = asyncio.timeout(deadline - time.monotonic())
    try:
        async with clock:
            return await work
    except TimeoutError:
        if not clock.expired():
            raise
        raise DeadlineExceeded("the deadline passed before the body had arrived") from None


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` gives; cancel it when the connection closes first. The body must have been read.

    Raises CallerGone.
    """
    when_gone: WhenGone | None = request.scope.get(WHEN_GONE)
    return await (_beside_a_watcher(request, work) if when_gone is None else _unless_gone(when_gone, work))


async def _unless_gone(when_gone: WhenGone, work: Coroutine[Any, Any, Result]) -> Result:
    task = asyncio.current_task()
    assert task is not None
    departures: list[bool] = []  # one, once the caller has gone
    if not when_gone(lambda: departures.append(task.cancel())):
        work.close()
        raise CallerGone(GONE)
    try:
        return await work
    except asyncio.CancelledError:
        if departures and task.uncancel() == 0:  # and nobody else wants this task to end
            raise CallerGone(GONE) from None
        raise
    finally:
        when_gone(None)


async def _beside_a_watcher(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_closed(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CallerGone(GONE)
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _closed(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
