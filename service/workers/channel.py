"""What supervisor and worker say to each other: JSON lines both ways, and accepted connections one way.

    supervisor → worker   start, view, do, shed, retire, drain, ping
    worker → supervisor   up, ready, failed, leaving, taken, closed, done, call, pong

A `call` is answered by `answer`, a `do` by `done`, each with the number it came with.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

LONGEST_LINE = 2**26  # bytes; certificates of all models go in one line

Message = dict[str, Any]


class Channel:
    """Messages over a connected stream socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, connection: socket.socket) -> "Channel":
        """Open a channel over one end of a socket pair, which is the channel's from here on."""
        return cls(*await asyncio.open_unix_connection(sock=connection, limit=LONGEST_LINE))

    def send(self, kind: str, **content: Any) -> None:
        """Send a message; one to a process that has ended is lost, and its end is told by `messages`."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps({"kind": kind, **content}).encode() + b"\n")

    async def messages(self) -> AsyncIterator[Message]:
        """Yield what the other side says until it is gone."""
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                yield json.loads(line)

    async def flush(self) -> None:
        """Wait until all is sent, or the other side is gone."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    def close(self) -> None:
        """Say no more."""
        self._writer.close()


def hand_over(connection: socket.socket, over: socket.socket) -> None:
    """Send an accepted connection to the process at the other end of a SEQPACKET pair. Raises OSError."""
    socket.send_fds(over, [b"c"], [connection.fileno()])


@dataclass(slots=True)
class Handed:
    """What came at once: connections; how many were lost for want of a descriptor; whether no more can come."""

    connections: list[socket.socket] = field(default_factory=list)
    lost: int = 0
    is_over: bool = False


def receive_connections(over: socket.socket) -> Handed:
    """Return the connections that were handed over. Never waits."""
    handed = Handed()
    while not handed.is_over:
        try:
            content, descriptors, _, _ = socket.recv_fds(over, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            break
        except OSError:
            content, descriptors = b"", []
        handed.is_over = not content
        handed.lost += bool(content) and not descriptors
        handed.connections += [_adopted(descriptor) for descriptor in descriptors]
    return handed


def _adopted(descriptor: int) -> socket.socket:
    connection = socket.socket(fileno=descriptor)
    connection.setblocking(False)
    return connection
