"""The app on uvicorn's HTTP, over connections that are handed to it: it neither listens nor minds signals here.

While it retires, every answer says `Connection: close`, so that callers with a kept connection go elsewhere before it
is cut.
"""

import asyncio
import contextlib
import ctypes
import logging
import math
import os
import socket
from collections.abc import Callable, Generator
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.app import create_app
from service.config import Settings
from service.crew import Crew
from service.inference import Service

M_MMAP_THRESHOLD = -3  # mallopt(3)
MMAP_THRESHOLD_BYTES = 2**20
FIRST_REQUEST_S = 0.5  # what a new connection gets to send its request in when the process is about to end


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
                app,
                http=HttpToolsProtocol,
                ws="none",
                proxy_headers=False,  # nobody asks who the client is
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s),
            )
        )
        self.closing = 0  # so many answers close their connection
        self.is_retiring = False  # and now all do
        self.on_up: Callable[[], None] = lambda: None
        self._on_closed = on_closed
        self._opening: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app's lifespan; listen to nothing."""
        await super().startup(sockets=[] if sockets is None else sockets)
        self.on_up()

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

    def _protocol(self) -> "_Connection":
        return _Connection(self, self.lifespan.state, self._on_closed)


class _Connection(HttpToolsProtocol):
    """One connection, which may be told to close with its next answer."""

    def __init__(self, server: HttpServer, app_state: dict[str, Any], on_closed: Callable[[], None]) -> None:
        super().__init__(server.config, server.server_state, app_state)
        self._server = server
        self._on_closed = on_closed
        self._has_asked = False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._on_closed()

    def shutdown(self) -> None:
        if not self._has_asked:  # its first request may be on the way
            self.loop.call_later(FIRST_REQUEST_S, super().shutdown)
        else:
            super().shutdown()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._has_asked = True
        server = self._server
        if server.is_retiring:
            self.cycle.keep_alive = False
        elif server.closing > 0:
            server.closing -= 1
            self.cycle.keep_alive = False


def give_memory_back() -> None:
    """Let glibc return large buffers to the system when they are freed.

    By default it raises its threshold to what was freed last, and after a few large images keeps up to 94 MB.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has habits of its own
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
