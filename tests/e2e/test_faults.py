"""Two workers under everything that clients do to them: afterwards they answer, and the counts are right."""

import asyncio
import os
import random
import time
from pathlib import Path

import pytest
from e2e_support import IMAGE, IMAGES, PLAIN, counted, cpu_ticks, post, wait_for, workers_of
from storm import Client, head, storm, trickle

pytestmark = pytest.mark.e2e

MIXED, CALLERS = 10_000, 40
CROWD, OVERLOAD_S = 512, 20.0
RECOVERS_WITHIN_S = 1.0
OVERSIZE = 30 * 2**20


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
    """What others do on the cores of a server and of this process from now on; work of the two is no excuse."""

    def __init__(self, server) -> None:
        self._own = (os.getpid(), server.process.pid, *workers_of(server))
        self._total, self._others = self._ticks()

    def slowness(self) -> float:
        """Return how many times as long all has taken as on a machine of its own: one by the share that was left."""
        total, others = self._ticks()
        passed, taken = total - self._total, max(0, others - self._others)
        return passed / max(1, passed - taken) if passed else 1.0

    def _ticks(self) -> tuple[int, int]:
        total, others = 0, -sum(map(cpu_ticks, self._own))
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        for name, *fields in map(str.split, Path("/proc/stat").read_text().splitlines()):
            if name in cores:
                user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[:8])  # proc(5)
                others += user + nice + system + steal  # interrupts are not told apart: they count as nobody's
                total += user + nice + system + idle + iowait + irq + softirq + steal
        return total, others


def seconds_to_recover(server) -> float:
    """Return after how long, on a machine of its own, a new caller who asks again when told to is answered."""

    async def until_answered(client: Client, _: int) -> None:
        status = None
        while status != 200:
            status, _, _ = await client.ask(IMAGE)

    neighbours, started = Neighbours(server), time.monotonic()
    asyncio.run(storm(server.url, 1, until_answered))
    return (time.monotonic() - started) / neighbours.slowness()


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
