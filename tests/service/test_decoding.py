"""The pool that decodes: bounded in pixels as in threads, fair to those who wait, and idle for those who have gone."""

import asyncio
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from support import until

from service.decoding import Decoders
from service.errors import DeadlineExceeded


class Work:
    """Asks for room for as many pixels as the number it is given; goes on while its gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self._lock = threading.Lock()
        self.now = 0
        self.peak = 0
        self.order: list[int] = []

    def __call__(self, encoded: bytes, hold) -> int:
        pixels = int(encoded)
        with hold(pixels):
            with self._lock:
                self.now += pixels
                self.peak = max(self.peak, self.now)
                self.order.append(pixels)
            assert self.gate.wait(30), "the test forgot to open the gate"
            with self._lock:
                self.now -= pixels
        if pixels == 13:
            raise ValueError("unlucky")
        return pixels


class Told:
    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.decoded_images = 0

    def decoded(self, seconds):
        assert seconds >= 0
        self.decoded_images += 1

    def dropped(self, reason):
        self.reasons.append(reason)


class Pool:
    def __init__(self, threads: int, max_pixels: int) -> None:
        self.decoders, self.work, self.told = Decoders(threads, max_pixels), Work(), Told()

    def ask(self, pixels: int, within_s: float = 30) -> asyncio.Task[int]:
        deadline = time.monotonic() + within_s
        asked = self.decoders.decode(self.work, str(pixels).encode(), deadline=deadline, observer=self.told)
        return asyncio.create_task(asked)

    @property
    def in_line(self) -> int:
        return len(self.decoders.room._line)


@contextmanager
def pool_of(threads: int, max_pixels: int):
    pool = Pool(threads, max_pixels)
    try:
        yield pool
    finally:
        pool.work.gate.set()
        pool.decoders.shutdown()


def test_pixels_in_memory_never_exceed_the_limit_and_all_are_decoded():
    async def scenario():
        with pool_of(8, 100) as pool:
            pool.work.gate.set()
            sizes = [60, 50, 40, 30, 100, 1, 99, 13, 70] * 5
            outcomes = await asyncio.gather(*map(pool.ask, sizes), return_exceptions=True)
            assert [one for one in outcomes if isinstance(one, int)] == [size for size in sizes if size != 13]
            assert pool.work.peak <= 100
            assert pool.decoders.room.free == 100

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_who_waits_for_room_holds_no_thread():
    async def scenario():
        with pool_of(2, 100) as pool:
            large = pool.ask(100)
            await until(lambda: pool.work.now == 100, "the large one is decoded")
            waiting = [pool.ask(90), pool.ask(80)]
            await until(lambda: pool.in_line == 2, "two wait in line")
            assert (
                await pool.decoders.decode(lambda *_: 1, b"", deadline=time.monotonic() + 30, observer=pool.told) == 1
            )
            pool.work.gate.set()
            assert await asyncio.gather(large, *waiting) == [100, 90, 80]
            assert pool.work.order == [100, 90, 80]

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_small_ones_do_not_slip_past_a_large_one_for_ever():
    async def scenario():
        with pool_of(4, 100) as pool:
            first = pool.ask(60)
            await until(lambda: pool.work.now == 60, "the first is decoded")
            large = pool.ask(90)
            await until(lambda: pool.in_line == 1, "the large one waits")
            small = pool.ask(10)  # there is room for it, but it came later
            await until(lambda: pool.in_line == 2, "the small one stands behind")
            pool.work.gate.set()
            await asyncio.gather(first, large, small)
            assert pool.work.order == [60, 90, 10]

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_one_who_leaves_the_line_lets_those_behind_pass():
    async def scenario():
        with pool_of(4, 100) as pool:
            first = pool.ask(60)
            await until(lambda: pool.work.now == 60, "the first is decoded")
            large, small = pool.ask(90), None
            await until(lambda: pool.in_line == 1, "the large one waits")
            small = pool.ask(10)
            await until(lambda: pool.in_line == 2, "the small one stands behind")
            large.cancel()
            await until(lambda: pool.work.now == 70, "the small one goes on")
            pool.work.gate.set()
            await asyncio.gather(first, small)
            assert pool.told.reasons == ["cancelled"]
            assert pool.decoders.room.free == 100

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("in_line", [False, True], ids=["waits for a thread", "waits for room"])
@pytest.mark.parametrize("how", ["cancelled", "deadline"])
def test_what_nobody_waits_for_is_not_decoded_and_counted_by_reason(how, in_line):
    async def scenario():
        with pool_of(2 if in_line else 1, 100) as pool:
            first = pool.ask(100)
            await until(lambda: pool.work.now == 100, "the first is decoded")
            gone = pool.ask(50, within_s=1 if how == "deadline" else 30)
            if in_line:
                await until(lambda: pool.in_line == 1, "it waits for room")
            await asyncio.sleep(0)
            if how == "cancelled":
                gone.cancel()
            with suppress(asyncio.CancelledError), pytest.raises(DeadlineExceeded):
                await gone
            pool.work.gate.set()
            assert await first == 100
            assert pool.work.order == [100]
            assert pool.told.reasons == [how]
            await until(lambda: pool.decoders.room.free == 100, "all room is free again")

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_quick_image_is_decoded_at_once_and_needs_no_thread():
    async def scenario():
        pool = Pool(threads=1, max_pixels=10)
        stuck = pool.ask(10)
        await until(lambda: pool.work.now == 10, "the thread is busy, and the room is taken")
        pool.work.gate.set()
        small = pool.decoders.decode(
            pool.work, b"64", deadline=time.monotonic() + 30, observer=pool.told, is_quick=True
        )
        with suppress(StopIteration):
            small.send(None)
            raise AssertionError("it waited")
        return await stuck, pool.work.order

    assert asyncio.run(scenario()) == (10, [10, 64])


def test_a_quick_file_that_holds_many_pixels_goes_through_the_pool_and_is_told_of_once():
    async def scenario():
        pool = Pool(threads=1, max_pixels=10_000)
        pool.work.gate.set()
        large = b"5000"
        return await pool.decoders.decode(
            pool.work, large, deadline=time.monotonic() + 30, observer=pool.told, is_quick=True
        ), pool.told.decoded_images

    assert asyncio.run(scenario()) == (5000, 1)
