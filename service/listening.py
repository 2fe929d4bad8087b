"""A listening socket, and an acceptor that never takes more connections than there is room for.

Beyond the limit connections are told so and closed. Where nobody can take one for the moment they wait in the kernel's
backlog, so that running out of file descriptors delays callers and breaks nothing. Knows no HTTP.
"""

import asyncio
import contextlib
import errno
import logging
import math
import resource
import socket
import time
from collections.abc import Callable
from typing import Literal

from service.config import Settings
from service.errors import AddressUnavailable
from service.problems import LINGER_S

BACKLOG = 2048  # the kernel caps it; overload is answered by the queue, not by refused connections
PAUSE_S = 0.05  # how long nothing is accepted after the system refused a descriptor
AT_ONCE = 64  # connections taken in one turn of the event loop
RESERVED_FILES = 128  # descriptors for models, logs, pipes and the runtime's own
MOST_REFUSED = 32  # connections that are being told that there is no room; they too cost a descriptor each
TELL_EVERY_S = 10.0
MANY_FILES = 2**20  # where the system sets no limit
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

Room = Literal["room", "wait", "full"]

logger = logging.getLogger(__name__)


def listen(settings: Settings) -> socket.socket:
    """Return a socket that listens where the settings say. Raises AddressUnavailable."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        where = f"{settings.host}:{settings.port}"
        raise AddressUnavailable(
            f"cannot listen on {where}: {error.strerror}; choose another with --host or --port"
        ) from None
    listener.setblocking(False)
    return listener


def connections_possible(wanted: int) -> int:
    """Return how many connections one process may hold: `wanted`, or what its limit of open files leaves.

    Raises the soft limit to the hard one first; a shell's default of 1,024 is meant for programs that use select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(soft, MANY_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    room = max(1, hard - RESERVED_FILES)
    return min(wanted, room) if wanted else room


class Acceptor:
    """Accepts connections on the running event loop while there is room, and hands each on.

    `room` says whether there is any; where it is "full", a connection gets the bytes of `refusal` and is closed.
    `deliver` returns False where it could not take the connection; it is then closed.
    """

    def __init__(
        self,
        listener: socket.socket,
        room: Callable[[], Room],
        deliver: Callable[[socket.socket], bool],
        refusal: bytes,
    ) -> None:
        self._listener = listener
        self._room = room
        self._deliver = deliver
        self._refusal = refusal
        self._refusing: set[asyncio.Task[None]] = set()
        self._told_at = -math.inf
        self._loop = asyncio.get_running_loop()
        self._is_open = False
        self._is_paused = True

    def open(self) -> None:
        """Begin to accept."""
        self._is_open = True
        self.resume()

    def resume(self) -> None:
        """Accept again: there may be room."""
        if self._is_open and self._is_paused:
            self._is_paused = False
            self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Accept no more and stop listening; who has been let into the backlog is accepted first."""
        if not self._is_open:
            return
        self._accept()
        self._pause()
        self._is_open = False
        self._listener.close()

    def _pause(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            self._loop.remove_reader(self._listener)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            room = self._room()
            if room == "wait" or (room == "full" and len(self._refusing) >= MOST_REFUSED):
                self._pause()
                return
            connection = self._next()
            if connection is None:
                return
            connection.setblocking(False)
            if room == "full":
                self._refuse(connection)
            elif not self._deliver(connection):
                connection.close()

    def _refuse(self, connection: socket.socket) -> None:
        if time.monotonic() - self._told_at > TELL_EVERY_S:
            self._told_at = time.monotonic()
            logger.warning("max_connections are open; more are refused")
        task = self._loop.create_task(_tell(connection, self._refusal))
        self._refusing.add(task)
        task.add_done_callback(self._refused)

    def _refused(self, task: asyncio.Task[None]) -> None:
        self._refusing.discard(task)
        self.resume()

    def _next(self) -> socket.socket | None:
        try:
            return self._listener.accept()[0]
        except OSError as error:
            if error.errno in EXHAUSTED:
                logger.error("no connection can be accepted for the moment: %s", error.strerror)
                self._pause()
                self._loop.call_later(PAUSE_S, self.resume)
            return None  # nobody waits, or whoever did has gone


async def _tell(connection: socket.socket, refusal: bytes) -> None:
    loop = asyncio.get_running_loop()
    with connection, contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER_S):
            await loop.sock_sendall(connection, refusal)
            connection.shutdown(socket.SHUT_WR)
            while await loop.sock_recv(connection, 2**16):
                pass
