"""Two workers under everything that clients do to them: afterwards they answer, and the counts are right."""

import asyncio
import os
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest
from e2e_support import IMAGE, IMAGES, PLAIN, counted, post, wait_for, workers_of
from storm import Client, head, storm, trickle

pytestmark = pytest.mark.e2e

MIXED, CALLERS = 10_000, 40
CROWD, OVERLOAD_S = 512, 20.0
RECOVERS_WITHIN_S = 1.0
OVERSIZE = 30 * 2**20
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def memory_of(server) -> int:
    """Return the proportional memory of the supervisor and its workers, bytes."""
    sizes = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in (server.process.pid, *workers_of(server))]
    return sum(int(text.partition("\nPss:")[2].split()[0]) * 1024 for text in sizes)


async def mixed(client: Client, number: int, count: int) -> None:
    """Do what clients do, by chance: one in two is fine, the others are each wrong in a way of their own."""
    chance = random.Random(number)
    for _ in range(count):
        match chance.randrange(20):
            case 0:
                await client.ask(b"no image at all")
            case 1:
                await client.ask(IMAGE[: len(IMAGE) // 2])
            case 2:
                await client.send(announce_too_much)
            case 3:
                await client.ask(IMAGE, x_request_timeout_ms=1)
            case 4:
                await client.hang_up(head(len(IMAGE)) + IMAGE[:20])
            case 5:
                await client.hang_up(head(len(IMAGE)) + IMAGE)
            case 6:
                await client.send(lambda writer: trickle(writer, IMAGE))
            case 7:
                await client.ask(b"", content_type="image/png")
            case _:
                await client.ask(chance.choice(IMAGES))


async def announce_too_much(writer: asyncio.StreamWriter) -> None:
    writer.write(head(OVERSIZE) + IMAGE)


def rounds(server, total: int):
    return asyncio.run(storm(server.url, CALLERS, lambda client, number: mixed(client, number, total // CALLERS)))


def codes_counted(server) -> dict[int, int]:
    known = (200, 400, 408, 413, 415, 422, 429, 499, 500, 503, 504)
    found = {code: int(counted(server.url, route="/predict", code=str(code))) for code in known}
    return {code: count for code, count in found.items() if count}


def test_thousands_of_mixed_requests_leave_nothing_behind_and_every_one_is_counted(start):
    server = start(*PLAIN, "--body-timeout-s", "5")
    first = rounds(server, MIXED // 2)
    settled = memory_of(server)
    second = rounds(server, MIXED - MIXED // 2)
    wait_for(lambda: sum(codes_counted(server).values()) >= first.sent + second.sent, "all is counted")

    sent = first.sent + second.sent
    seen, counts = first.statuses + second.statuses, codes_counted(server)
    assert sent == MIXED
    assert set(seen) == {200, 400, 413, 415, 422, 504} or set(seen) == {200, 400, 413, 415, 422}
    assert sum(counts.values()) == sent
    assert {code: counts.get(code, 0) for code in seen if code != 200} == {
        code: count for code, count in seen.items() if code != 200
    }
    assert counts[200] + counts.get(499, 0) == seen[200] + first.hung_up + second.hung_up
    assert counted(server.url, "foldserve_pending_request_count") == 0, "no future is pending"
    assert memory_of(server) <= 1.1 * settled
    assert post(server.url, IMAGE).status_code == 200
    assert "Traceback" not in server.said()
    assert server.terminate() == 0


class Neighbours:
    """What others do from now on, on the cores of a server and of this process; work of these two is no excuse."""

    def __init__(self, server) -> None:
        self._own = (os.getpid(), server.process.pid, *workers_of(server))
        self._before = self._seconds()

    def slowness(self, wanted: int | None = None) -> float:
        """Return how many times as long all took as on a machine of its own; it wants a core for each process.

        Not more than by the cores that others left, nor than by what waited for one: who sleeps wants none.
        """
        pairs = zip(self._seconds(), self._before, strict=True)
        passed, others, ran, waited = (after - before for after, before in pairs)
        cores = len(os.sched_getaffinity(0))
        left = max(0.01, cores * (1 - max(0.0, others) / max(0.01, passed)))
        return max(1.0, min(min(cores, wanted or len(self._own)) / left, 1 + waited / max(0.01, ran)))

    def _seconds(self) -> tuple[float, float, float, float]:
        """Return the seconds of all these cores, those that others took, and those that our threads ran and waited."""
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        ticks = [list(map(int, fields[1:9])) for fields in lines if fields[0] in cores]  # proc(5)
        passed = sum(map(sum, ticks)) / TICKS_PER_S
        busy = sum(sum(one[:3]) + one[7] for one in ticks) / TICKS_PER_S  # user, nice, system and stolen
        threads = [thread for pid in self._own for thread in Path(f"/proc/{pid}/task").glob("*/schedstat")]
        counts: list[list[int]] = []  # sched-stats.rst: nanoseconds run, nanoseconds waited
        for thread in threads:
            with suppress(OSError):  # it has ended meanwhile
                counts.append(list(map(int, thread.read_text().split())))
        ran, waited = (sum(count[part] for count in counts) / 1e9 for part in (0, 1))
        return passed, busy - ran, ran, waited


def seconds_to_recover(server) -> float:
    """Return after how long, on a machine of its own, a new caller who asks again when told to is answered."""

    async def until_answered(client: Client, _: int) -> None:
        status = None
        while status != 200:
            status, _, _ = await client.ask(IMAGE)

    neighbours, started = Neighbours(server), time.monotonic()
    asyncio.run(storm(server.url, 1, until_answered))
    return (time.monotonic() - started) / neighbours.slowness(wanted=1)


def test_overload_is_answered_200_429_or_504_within_the_deadline_and_is_over_when_the_crowd_has_gone(start):
    deadline_s = 2.0
    server = start(*PLAIN, "--request-timeout-s", str(deadline_s), "--max-queue-size", "64")
    until = time.monotonic() + OVERLOAD_S

    async def insist(client: Client, _: int) -> None:
        while time.monotonic() < until:
            status, top, _ = await client.ask(IMAGE)
            if status == 429:
                assert b"retry-after:" in top
                await asyncio.sleep(0.05)  # a second would be polite, and no overload

    neighbours = Neighbours(server)
    tally = asyncio.run(storm(server.url, CROWD, insist))
    slowness = neighbours.slowness()
    counts = codes_counted(server)
    recovered_s = seconds_to_recover(server)

    assert set(tally.statuses) <= {200, 429, 504}
    assert tally.statuses[200] > 100
    assert tally.statuses[429] > 0
    accepted = sorted(seconds for status, seconds in tally.seconds if status == 200)
    assert accepted[int(0.99 * len(accepted))] < 1.5 * deadline_s * slowness  # on the clock of 512 busy clients
    assert recovered_s < RECOVERS_WITHIN_S
    assert counts == dict(tally.statuses)


def test_a_crowd_that_hangs_up_leaves_no_work_behind_and_the_next_caller_is_answered_soon(start):
    server = start(*PLAIN)
    asyncio.run(storm(server.url, CROWD, lambda client, _: client.hang_up(head(len(IMAGE)) + IMAGE)))

    assert seconds_to_recover(server) < RECOVERS_WITHIN_S
    wait_for(lambda: sum(codes_counted(server).values()) > CROWD, "those who left are counted")
    assert set(codes_counted(server)) <= {200, 429, 499}
    assert codes_counted(server)[499] > CROWD / 2, "nobody answers those who have gone"
    assert counted(server.url, "foldserve_pending_request_count") == 0


def test_one_bad_image_among_nine_fails_nobody_else(start):
    server = start(*PLAIN)

    async def ask(client: Client, number: int) -> None:
        for turn in range(20):
            is_bad = (number + turn) % 9 == 0
            status, _, body = await client.ask(IMAGE[:50] if is_bad else IMAGE)
            assert status == (422 if is_bad else 200), body

    tally = asyncio.run(storm(server.url, 16, ask))
    assert tally.statuses[200] + tally.statuses[422] == 320
