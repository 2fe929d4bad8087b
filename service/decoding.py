"""A pool that decodes images off the event loop: bounded in threads, and in pixels that are in memory at once.

An image's size is known once its header is read. One that finds no room goes back to the loop and waits there, first
come first served, so that waiting holds no thread. What nobody waits for any more is not decoded.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

from service.errors import DeadlineExceeded
from service.preprocessing import Hold, hold_nothing
from service.small_files import QUICK_PIXELS

Decoded = TypeVar("Decoded")

NOTHING = nullcontext()
LATE = "the deadline passed before the image was decoded"


class Observer(Protocol):
    """Told what happens, for metrics."""

    def decoded(self, seconds: float) -> None:
        """An image was decoded, or found to be none, in so many seconds."""

    def dropped(self, reason: str) -> None:
        """An image was not decoded: "cancelled" or "deadline"."""


class _NoRoom(Exception):
    def __init__(self, pixels: int) -> None:
        super().__init__(pixels)
        self.pixels = pixels


class PixelRoom:
    """Room for pixels in memory. Threads try; the event loop waits in line, and while somebody does, threads fail."""

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()
        self.free = limit
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextmanager
    def try_hold(self, pixels: int) -> Iterator[None]:
        """Hold room while the block runs. Raises _NoRoom at once."""
        with self._lock:
            if self._line or pixels > self.free:
                raise _NoRoom(pixels)
            self.free -= pixels
        try:
            yield
        finally:
            self.give_back(pixels)

    async def take(self, pixels: int) -> None:
        """Wait for room and take it; `give_back` is the caller's duty."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._line.append((pixels, granted))
        self.give_back(0)
        try:
            await granted
        except asyncio.CancelledError:
            self._leave(pixels, granted)
            raise

    def give_back(self, pixels: int) -> None:
        """Make room, and let in who stands first as long as there is enough. Safe from any thread."""
        with self._lock:
            self.free += pixels
            while self._line and self._line[0][0] <= self.free:
                wanted, granted = self._line.popleft()
                self.free -= wanted
                granted.get_loop().call_soon_threadsafe(_grant, granted, self, wanted)

    def _leave(self, pixels: int, granted: "asyncio.Future[None]") -> None:
        with self._lock:
            still_waits = (pixels, granted) in self._line
            if still_waits:
                self._line.remove((pixels, granted))
        if still_waits:
            self.give_back(0)  # it may have stood in the way of smaller ones
        elif not granted.cancelled():
            self.give_back(pixels)  # let in, and left at the same moment


def _grant(granted: "asyncio.Future[None]", room: PixelRoom, pixels: int) -> None:
    if granted.done():
        room.give_back(pixels)  # its caller left while the word was under way
    else:
        granted.set_result(None)


class Decoders:
    """Threads that decode. `max_pixels` must hold the largest image that is accepted, or that one waits for ever."""

    def __init__(self, threads: int, max_pixels: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.room = PixelRoom(max_pixels)

    def shutdown(self) -> None:
        """End the threads; what is not decoded yet never will be."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def decode(
        self,
        decode: Callable[[bytes, Hold], Decoded],
        encoded: bytes,
        *,
        deadline: float,
        observer: Observer,
        is_quick: bool = False,
    ) -> Decoded:
        """Return what `decode` gives for an encoded image and the room that it asks.

        `deadline` is a time of `time.monotonic`, in seconds; with `is_quick` an image that is small by its header is
        decoded at once: it takes 0.03 to 0.1 ms, a thread and the way back 0.1 ms more.
        Raises DeadlineExceeded, or what `decode` raises.
        """
        if is_quick and (decoded := self.decode_at_once(decode, encoded, deadline=deadline, observer=observer)):
            return decoded
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                try:
                    return await self._submit(decode, encoded, deadline, observer, self.room.try_hold)
                except _NoRoom as full:
                    await self._stand_in_line(full.pixels, deadline, observer)
                    return await self._submit(decode, encoded, deadline, observer, hold_nothing, held=full.pixels)
        except TimeoutError:
            raise DeadlineExceeded(LATE) from None

    def decode_at_once(
        self, decode: Callable[[bytes, Hold], Decoded], encoded: bytes, *, deadline: float, observer: Observer
    ) -> Decoded | None:
        """Return what `decode` gives for an image that is small by its header, None for any other."""
        try:
            return _attempt(decode, encoded, deadline, observer, _hold_few)
        except _NoRoom:
            return None

    async def _stand_in_line(self, pixels: int, deadline: float, observer: Observer) -> None:
        try:
            await self.room.take(pixels)
        except asyncio.CancelledError:
            observer.dropped(_reason(deadline))
            raise

    async def _submit(
        self,
        decode: Callable[[bytes, Hold], Decoded],
        encoded: bytes,
        deadline: float,
        observer: Observer,
        hold: Hold,
        held: int = 0,
    ) -> Decoded:
        future = self._threads.submit(_attempt, decode, encoded, deadline, observer, hold)
        if held:
            future.add_done_callback(lambda _: self.room.give_back(held))  # decoded, failed, or never begun
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            _count_if_unbegun(future, deadline, observer)
            raise


def _hold_few(pixels: int) -> AbstractContextManager[None]:
    if pixels > QUICK_PIXELS:
        raise _NoRoom(pixels)
    return NOTHING


def _attempt(
    decode: Callable[[bytes, Hold], Decoded], encoded: bytes, deadline: float, observer: Observer, hold: Hold
) -> Decoded:
    if time.monotonic() >= deadline:  # it waited for a thread until nobody waited for it
        observer.dropped("deadline")
        raise DeadlineExceeded(LATE)
    started = time.perf_counter()
    try:
        decoded = decode(encoded, hold)
    except _NoRoom:
        raise
    except Exception:
        observer.decoded(time.perf_counter() - started)
        raise
    observer.decoded(time.perf_counter() - started)
    return decoded


def _count_if_unbegun(future: "Future[Decoded]", deadline: float, observer: Observer) -> None:
    if future.cancel():
        observer.dropped(_reason(deadline))


def _reason(deadline: float) -> str:
    return "deadline" if time.monotonic() >= deadline else "cancelled"
