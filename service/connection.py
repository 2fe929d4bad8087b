"""One connection: uvicorn's HTTP, with a head that is bounded in bytes and in time, and refusals that say why.

What is no HTTP, a head that is too large and one that does not arrive are answered here, for no application is reached.
"""

import asyncio
import socket
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.joining import JoinedWrites
from service.problems import LINGER_S, as_http
from service.routes.connection import ARRIVED, SINCE_LAST_BYTE, WHEN_GONE

FIRST_REQUEST_S = 0.5  # what a new connection gets to send its request in when the process is about to end


TCP_INFO_BYTES = 56  # of linux/tcp.h's tcp_info, up to and with tcpi_last_data_recv, milliseconds


class Host(Protocol):
    """What a connection asks of its server."""

    config: uvicorn.Config
    server_state: ServerState
    max_head_bytes: int
    head_timeout_s: float

    def closes_next(self) -> bool:
        """True where the next answer is to close its connection; it is asked once for each."""

    def refused(self, status: int, reason: str) -> None:
        """A request was refused before it reached the application."""


class Connection(HttpToolsProtocol):
    """One connection; `on_closed` hears of its end."""

    def __init__(self, host: Host, app_state: dict[str, Any], on_closed: Callable[[], None]) -> None:
        super().__init__(host.config, host.server_state, app_state)
        self._host = host
        self._on_closed = on_closed
        self._has_asked = False
        self._is_refused = False
        self._is_lost = False
        self._when_gone: Callable[[], object] | None = None
        self._since = 0  # bytes that came since the last end of a head, piece of a body or end of a message
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoinedWrites(transport, self.loop))  # type: ignore[arg-type] # one in all but its class
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()
        self._is_lost = True
        if self._when_gone is not None:
            self._when_gone()
        if self.scope is not None:
            self.scope.pop(WHEN_GONE, None)  # type: ignore[misc] # else only the garbage collector frees it
        self._on_closed()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        self._since += len(data)
        try:
            self.parser.feed_data(data)
            self._check_size(self._since)
        except httptools.HttpParserUpgrade:
            pass  # to nothing that is spoken here; the request is answered as if it had not asked
        except (_Refused, httptools.HttpParserError) as error:
            self._refuse(_reason_of(error))
        else:
            if self._since and self._patience is None and (self.cycle is None or self.cycle.response_complete):
                self._wait_for_head()

    def on_headers_complete(self) -> None:
        if self._since > self._host.max_head_bytes:  # or it came in one piece with its body
            self._check_size(len(self.url) + sum(len(name) + len(value) for name, value in self.headers))
        self._since = 0
        self._stop_waiting()
        super().on_headers_complete()
        self.scope[WHEN_GONE] = self._call_when_gone  # type: ignore[literal-required]
        self.scope[ARRIVED] = partial(_arrived, weakref.ref(self.cycle))  # type: ignore[literal-required]
        self.scope[SINCE_LAST_BYTE] = partial(_since_last_byte_s, self.transport)  # type: ignore[literal-required]
        self._has_asked = True
        if self._host.closes_next():
            self.cycle.keep_alive = False

    def _call_when_gone(self, callback: Callable[[], object] | None) -> bool:
        """Let `callback` be what is called when the caller hangs up; return False where he has done so already.

        uvicorn stops reading at a large body, and would not see him go. Where he has sent more requests they are what
        stopped it, and it stays so: else he could have any number of them wait here.
        """
        self._when_gone = callback
        if callback is not None and not self.pipeline:
            self.flow.resume_reading()
        return not self._is_lost

    def on_body(self, body: bytes) -> None:
        self._since = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._since = 0
        super().on_message_complete()

    def shutdown(self) -> None:
        if not self._has_asked:  # its first request may be on the way
            self.loop.call_later(FIRST_REQUEST_S, super().shutdown)
        else:
            super().shutdown()

    def _wait_for_head(self) -> None:
        self._patience = self.loop.call_later(self._host.head_timeout_s, self._refuse_pace)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _check_size(self, size: int) -> None:
        if size > (limit := self._host.max_head_bytes):
            raise _Refused(431, "head-too-large", f"the head has over {limit} bytes; send fewer or shorter headers")

    def _refuse_pace(self) -> None:
        if self._since:
            limit_s = self._host.head_timeout_s
            self._refuse(_Refused(408, "head-too-slow", f"the head did not arrive within {limit_s:g} s"))
        else:
            self.transport.close()  # it never asked

    def _refuse(self, why: "_Refused") -> None:
        if self._is_refused:
            return
        self._is_refused = True
        self._stop_waiting()
        self._host.refused(why.status, why.name)
        if self.cycle is not None and not self.cycle.response_complete:
            if self.pipeline or self.cycle.response_started or not self.cycle.more_body:
                self.transport.abort()  # an answer before or amid another would be read as that one
                return
            self.cycle.disconnected = True  # what follows is its answer
            self.cycle.message_event.set()
        self.transport.write(as_http(why.status, why.name, why.detail))
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


def _since_last_byte_s(transport: asyncio.Transport) -> float:
    """Return how long ago the kernel got the last byte for this connection: while the event loop is busy, it waits."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    try:
        told = b"" if connection is None else connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    except (OSError, ValueError):  # closed meanwhile, or no TCP
        return 0.0
    return int.from_bytes(told[-4:], sys.byteorder) / 1000 if len(told) == TCP_INFO_BYTES else 0.0


def _arrived(reference: "weakref.ref[RequestResponseCycle]") -> bytes | None:
    """Take the body out where all of it is here: a kept connection would hold it until the next request.

    The cycle lives while its request is served. It holds the scope, and the scope this: without the weak reference the
    body of a request that never asks for it would stay until the garbage collector runs.
    """
    cycle = reference()
    if cycle is None or cycle.more_body or cycle.disconnected:
        return None
    body, cycle.body = bytes(cycle.body), bytearray()
    return body


class _Refused(Exception):
    def __init__(self, status: int, name: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.name, self.detail = status, name, detail


def _reason_of(error: Exception) -> _Refused:
    """Return why a request is refused: the parser wraps what its callbacks raise."""
    for one in (error, error.__context__):
        if isinstance(one, _Refused):
            return one
    return _Refused(400, "malformed-request", "this is not HTTP/1.1")
