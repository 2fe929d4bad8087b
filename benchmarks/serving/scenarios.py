"""What happens when clients misbehave: too many at once, who leave; a bad image among good ones; a bomb.

Each scenario lasts a few seconds.
"""

import struct
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.serving.callers import ask
from benchmarks.serving.processes import cpu_s, proportional_mb, tree
from benchmarks.serving.servers import Request, Server, post

CROWD = 512
PATIENCE_MS = 2000
LEAVE_AFTER_S = 0.5
CLIENTS, REQUESTS_EACH, BAD_EVERY = 16, 30, 10
BOMB_SIDE = 13_000


@dataclass(frozen=True, slots=True)
class Crowd:
    """512 callers at once who wait 2 s; then 512 who hang up after half a second, and one who comes after them."""

    answered: int
    shed: int
    other: int
    longest_wait_s: float
    next_caller_s: float
    rows_for_the_gone: int | None


def crowd(server: Server) -> Crowd:
    """Send 512 requests at once, twice. The first time with a deadline, where the server knows one."""
    calls = ask(server.port, _bytes_of(server, f"X-Request-Timeout-Ms: {PATIENCE_MS}\r\n"), CROWD)
    time.sleep(1)  # what the first crowd left behind is not the second one's
    ask(server.port, _bytes_of(server, ""), CROWD, patience_s=LEAVE_AFTER_S)
    rows, started = _rows(server), time.monotonic()
    status = post(server.port, server.request)
    next_s = time.monotonic() - started
    more = _rows(server)
    statuses = [call.status for call in calls]
    return Crowd(
        statuses.count(200),
        statuses.count(429) + statuses.count(504) + statuses.count(503),
        sum(one not in {200, 429, 503, 504} for one in statuses) + (status != 200),
        max(call.waited_s for call in calls),
        next_s,
        None if rows is None or more is None else more - rows - 1,
    )


def spoiled(server: Server) -> tuple[int, int]:
    """Return how many good requests were sent by 16 clients, one in ten of whose images is bad, and how many failed."""
    bad = Request(server.request.path, b"", server.request.content_type)

    def work(client: int) -> tuple[int, int]:
        sent = failed = 0
        for number in range(REQUESTS_EACH):
            if (number + client) % BAD_EVERY == 0:
                post(server.port, bad, body=_spoil(server.request.body))
            else:
                sent += 1
                failed += post(server.port, server.request) != 200
        return sent, failed

    with ThreadPoolExecutor(CLIENTS) as pool:
        results = list(pool.map(work, range(CLIENTS)))
    return sum(sent for sent, _ in results), sum(failed for _, failed in results)


def bomb(server: Server) -> tuple[int, float, float]:
    """Send a PNG of 21 KB and 169 million pixels; return its status, seconds, and MB that the server grew by."""
    before, started = proportional_mb(server.pid), time.monotonic()
    status = post(server.port, server.request, body=_black_png(BOMB_SIDE))
    return status, time.monotonic() - started, proportional_mb(server.pid) - before


def shares_of_workers(server: Server, before: dict[int, float]) -> list[float]:
    """Return what CPU seconds each child of a server has used since `before`, least first."""
    after = cpu_of_children(server)
    return sorted(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def cpu_of_children(server: Server) -> dict[int, float]:
    """Return the CPU seconds of each child process of a server."""
    return {pid: cpu_s(pid) for pid in tree(server.pid)[1:]}


def _spoil(body: bytes) -> bytes:
    """Return the body with an image that is cut off in its middle, of the same length."""
    middle = len(body) // 2
    return body[:middle] + bytes(b"A"[0] for _ in range(len(body) - middle - 80)) + body[-80:]


def _bytes_of(server: Server, head: str) -> bytes:
    """Return a request as it goes over the wire, with more lines of its head."""
    request = server.request
    lines = f"POST {request.path} HTTP/1.1\r\nhost: x\r\ncontent-type: {request.content_type}\r\n"
    return f"{lines}{head}content-length: {len(request.body)}\r\n\r\n".encode() + request.body


def _rows(server: Server) -> int | None:
    """Return the rows that foldserve has run, or None of a server that does not tell."""
    if not server.name.startswith("foldserve"):
        return None
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("foldserve_executed_rows_total"))


def _black_png(side: int) -> bytes:
    packed = zlib.compressobj(9)
    row = b"\0" * (1 + (side + 7) // 8)
    pixels = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
