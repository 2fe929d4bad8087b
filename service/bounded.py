"""uvicorn's HTTP with bounds: a head in bytes and in time, an answer in the time that its caller may leave it unread.

What is no HTTP, a head that is too large and one that does not arrive are answered here, for no application is reached.
"""

import asyncio
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.arrival import seconds_since_last_byte, take_body, unread_bytes
from service.joining import JoinedWrites
from service.problems import LINGER_S, as_http
from service.routes.connection import ARRIVED, SINCE_LAST_BYTE, WHEN_GONE

FIRST_REQUEST_S = 0.5  # what a new connection gets to send its request in when the process is about to end
FRAMING = frozenset({b"content-length", b"transfer-encoding"})


class Host(Protocol):
    """What a connection asks of its server."""

    config: uvicorn.Config
    server_state: ServerState
    max_head_bytes: int
    head_timeout_s: float
    send_timeout_s: float

    def closes_next(self) -> bool:
        """True where the next answer is to close its connection; it is asked once for each."""

    def refused(self, status: int, reason: str) -> None:
        """A request was refused before it reached the application."""


class BoundedConnection(HttpToolsProtocol):
    """One connection; `on_closed` hears of its end."""

    def __init__(self, host: Host, app_state: dict[str, Any], on_closed: Callable[[], None]) -> None:
        super().__init__(host.config, host.server_state, app_state)
        self._host = host
        self._on_closed = on_closed
        self._has_asked = False
        self._is_refused = False
        self._is_lost = False
        self._is_repeating = False
        self._when_gone: Callable[[], object] | None = None
        self._since = 0  # bytes that came since the last end of a head, piece of a body or end of a message
        self._patience: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # TCP's, as uvicorn says
        self._joined = JoinedWrites(transport, self.loop)
        super().connection_made(self._joined)  # type: ignore[arg-type] # one in all but its class
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()
        self._stop_waiting_for_reader()
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
        try:
            while data:
                data = self._parse(data)
            self._check_size(self._since)
        except (_Refused, httptools.HttpParserError) as error:
            self._refuse(_reason_of(error))
        else:
            if self._since and self._patience is None and self._is_free:
                self._wait_for_head()

    def _parse(self, data: bytes) -> bytes:
        """Parse bytes; return those behind a head that asks for another protocol (RFC 9110, section 7.8)."""
        self._since += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as asked:
            self._stay_with_http()
            return data[asked.args[0] :]
        return b""

    def _stay_with_http(self) -> None:
        """Read on after such a head as if it had not asked.

        Its parser takes all that follows for the other protocol's: a body would be lost, or be read as the next
        request. So another one is told of the body, in a head that nobody else hears of.
        """
        framing = b"".join(b"%s: %s\r\n" % one for one in self.headers if one[0] in FRAMING)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._is_repeating = True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n")
        self._is_repeating = False

    @property
    def _is_free(self) -> bool:
        """True while no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def on_message_begin(self) -> None:
        if not self._is_repeating:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._is_repeating:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_repeating:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_repeating:
            return
        if self._since > self._host.max_head_bytes:  # or it came in one piece with its body
            self._check_size(len(self.url) + sum(len(name) + len(value) for name, value in self.headers))
        self._since = 0
        self._stop_waiting()
        self._has_asked = True
        self._begin()

    def _begin(self) -> None:
        """Let the app serve the request whose head is here."""
        super().on_headers_complete()
        self.scope[WHEN_GONE] = self._call_when_gone  # type: ignore[literal-required]
        self.scope[ARRIVED] = partial(take_body, weakref.ref(self.cycle))  # type: ignore[literal-required]
        self.scope[SINCE_LAST_BYTE] = partial(seconds_since_last_byte, self.transport)  # type: ignore[literal-required]
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
        if self.parser.should_upgrade():
            return  # its body, if it has one, follows
        self._since = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        self._stop_waiting_for_reader()
        super().resume_writing()

    def _wait_for_reader(self) -> None:
        unread = unread_bytes(self.transport)
        self._sending = self.loop.call_later(self._host.send_timeout_s, self._check_reader, unread)

    def _check_reader(self, unread: int) -> None:
        if unread_bytes(self.transport) < unread:
            self._wait_for_reader()  # slow, but reading
        else:
            self._sending = None
            self.transport.abort()  # else what it does not read is held for as long as it likes

    def _stop_waiting_for_reader(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

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
