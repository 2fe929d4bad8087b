"""Work that is worth doing only while somebody waits for it."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from service.errors import CallerGone, DeadlineExceeded

Result = TypeVar("Result")


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
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_closed(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CallerGone("the connection closed before there was an answer")
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _closed(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
