"""The app on uvicorn's HTTP, over connections that are handed to it: it neither listens nor minds signals here.

While it retires, every answer says `Connection: close`, so that callers with a kept connection go elsewhere before it
is cut.
"""

import asyncio
import contextlib
import ctypes
import gc
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Generator

import uvicorn
from fastapi import FastAPI

from service.app import create_app, direct_of, entry_of
from service.config import Settings
from service.connection import Connection
from service.crew import Crew
from service.inference import Service
from service.metrics import Metrics
from service.observing import UNMATCHED
from service.wording import counted

M_MMAP_THRESHOLD = -3  # mallopt(3)
MMAP_THRESHOLD_BYTES = 2**20
M_TRIM_THRESHOLD = -1
TRIM_THRESHOLD_BYTES = 4 * 2**20
COLLECT_AFTER = 10_000  # by default a crowd of 64 calls brings the collector each few requests, for a tenth of the loop
SWITCH_INTERVAL_S = 0.0005  # by default a lane whose run has ended waits 5 ms for the interpreter, longer than it ran

logger = logging.getLogger(__name__)


class Serving:
    """The service behind HTTP, from its start to its end: `run`, then `retire`, then `drain`."""

    def __init__(self, settings: Settings, crew: Crew, on_closed: Callable[[], None]) -> None:
        self.failures: list[BaseException] = []
        app = create_app(settings, on_failure=self._give_up, crew=crew)
        self.service: Service = app.state.service
        self.http = HttpServer(app, settings, on_closed)

    async def run(self, on_up: Callable[[], None]) -> None:
        """Serve until `drain` and all is answered; `on_up` is called once connections may be handed over.

        Raises what ended the service for good. Does not return where a run hangs, for its thread cannot be ended.
        """
        self.http.on_up = on_up
        give_memory_back()
        collect_less()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        await self.http.serve()
        if self.service.is_stuck:
            logging.shutdown()
            os._exit(1)
        if self.failures:
            raise self.failures[0]

    def retire(self) -> None:
        """Be ready no more, but answer what still arrives, each connection once."""
        self.service.retire()
        self.http.is_retiring = True

    def drain(self) -> None:
        """Answer what is in hand, then end."""
        self.retire()
        self.http.should_exit = True

    def _give_up(self, error: BaseException) -> None:
        self.failures.append(error)
        self.http.should_exit = True


class HttpServer(uvicorn.Server):
    """Serves an app on connections that `take` is given; `on_closed` hears of each that ends."""

    def __init__(self, app: FastAPI, settings: Settings, on_closed: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                entry_of(app),
                interface="asgi3",
                http=Connection,
                ws="none",
                proxy_headers=False,  # nobody asks who the client is
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type] # it says int, and means seconds
                timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s),
            )
        )
        self.direct = direct_of(app)
        self.closing = 0  # so many answers close their connection
        self.is_retiring = False  # and now all do
        self.on_up: Callable[[], None] = lambda: None
        self.max_head_bytes, self.head_timeout_s = settings.max_head_bytes, settings.head_timeout_s
        self.send_timeout_s = settings.send_timeout_s
        self._drain_timeout_s = settings.drain_timeout_s
        self._metrics: Metrics = app.state.service.metrics
        self._on_closed = on_closed
        self._opening: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app's lifespan; listen to nothing."""
        await super().startup(sockets=[] if sockets is None else sockets)
        self.on_up()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is in hand, for `drain_timeout_s`; then close what is open, so that nobody's image is run."""
        ending = asyncio.get_running_loop().call_later(self._drain_timeout_s, self._close_all)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    def _close_all(self) -> None:
        owed = list(self.server_state.connections)
        if owed:
            text = "the time to answer what was in hand is over (drain_timeout_s): %s closed without an answer"
            logger.error(text, counted(len(owed), "connection"))
        for connection in owed:
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals to whoever runs the server."""
        yield

    def take(self, connection: socket.socket) -> bool:
        """Serve an accepted connection, which is the server's from here on."""
        task = asyncio.get_running_loop().create_task(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return True

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self.server_state.connections) + len(self._opening)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        except OSError:  # its caller has gone already
            connection.close()
            self._on_closed()

    def _protocol(self) -> Connection:
        return Connection(self, self.lifespan.state, self._on_closed)

    def closes_next(self) -> bool:
        """True where the next answer is to close its connection; it is asked once for each."""
        if self.is_retiring or self.closing <= 0:
            return self.is_retiring
        self.closing -= 1
        return True

    def refused(self, status: int, reason: str) -> None:
        """Count a request that was refused before it reached the app."""
        self._metrics.request(UNMATCHED, status, reason)


def collect_less() -> None:
    """Spare the collector of cycles all that was imported, and let it come once more has been made than a crowd makes.

    Models load later: what is frozen would never be freed again.
    """
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


def give_memory_back() -> None:
    """Let glibc return large buffers to the system when they are freed, and keep what every run takes anew.

    By default it raises its threshold to what was freed last, and after a few large images keeps up to 94 MB. Once that
    is fixed, so is what it keeps of small buffers, at 128 KB a thread: seven pages a request went, and came as faults.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has habits of its own
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
