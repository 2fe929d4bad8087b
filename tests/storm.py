"""A client for storms: raw HTTP over asyncio sockets, so that it costs less than what it asks for.

Each way of asking says how often the server must have counted it, and under which code where the client saw one.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PATIENCE_S = 60.0


@dataclass
class Tally:
    """What clients saw: answers by status, requests they hung up on, seconds that each answered one took."""

    statuses: Counter[int] = field(default_factory=Counter)
    hung_up: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: list[tuple[int, float]] = field(default_factory=list)

    @property
    def sent(self) -> int:
        return sum(self.statuses.values()) + self.hung_up


def head(length: int, **headers: object) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n{''.join(lines)}\r\n".encode()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    """Return status, head and body of an answer."""
    top = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", top)
    body = await reader.readexactly(int(length[1])) if length else await reader.read()
    return int(top[9:12]), top, body


class Client:
    """One caller with one kept connection, which it opens anew where the server closed it."""

    def __init__(self, url: str, tally: Tally) -> None:
        address = httpx.URL(url)
        self._where = (address.host, address.port)
        self._streams: Streams | None = None
        self.tally = tally

    async def ask(self, content: bytes, **headers: object) -> tuple[int, bytes, bytes]:
        """Send a whole request; count and return its answer."""
        return await self.send(lambda writer: _write(writer, head(len(content), **headers) + content))

    async def send(self, write: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> tuple[int, bytes, bytes]:
        reader, writer = await self._open()
        started = time.monotonic()
        async with asyncio.timeout(PATIENCE_S):
            await write(writer)
            status, top, body = await read_answer(reader)
        self.tally.statuses[status] += 1
        self.tally.seconds.append((status, time.monotonic() - started))
        if b"connection: close" in top.lower():
            await self.close()
        return status, top, body

    async def hang_up(self, sent: bytes) -> None:
        """Send something and leave without reading."""
        _, writer = await self._open()
        writer.write(sent)
        await writer.drain()
        self.tally.hung_up += 1
        await self.close()

    async def _open(self) -> Streams:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._where)
        return self._streams

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _write(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(content)
    await writer.drain()


async def trickle(writer: asyncio.StreamWriter, content: bytes) -> None:
    """Write a body in pieces with pauses."""
    writer.write(head(len(content)))
    for start in range(0, len(content), 40):
        writer.write(content[start : start + 40])
        await asyncio.sleep(0.01)


async def storm(url: str, clients: int, act: Callable[[Client, int], Awaitable[None]]) -> Tally:
    """Let `clients` act at once, each with its number; return what they saw together."""
    tally = Tally()

    async def one(number: int) -> None:
        client = Client(url, tally)
        try:
            await act(client, number)
        finally:
            await client.close()

    await asyncio.gather(*(one(number) for number in range(clients)))
    return tally
