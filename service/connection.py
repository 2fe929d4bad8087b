"""One connection: uvicorn's HTTP, with a head that is bounded in bytes and in time, and refusals that say why.

What is no HTTP, a head that is too large and one that does not arrive are answered here, for no application is reached.
"""

import asyncio
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from service.arrival import seconds_since_last_byte, take_body
from service.joining import JoinedWrites
from service.problems import LINGER_S, as_http
from service.routes.connection import ARRIVED, SINCE_LAST_BYTE, WHEN_GONE
from service.routes.direct import Direct, Exchange
from service.routes.heads import Fields, Head

FIRST_REQUEST_S = 0.5  # what a new connection gets to send its request in when the process is about to end


TICK_S = 0.01  # the event loop's clock may be so much behind
CLOSE = (b"connection", b"close")


class Host(Protocol):
    """What a connection asks of its server."""

    config: uvicorn.Config
    direct: Direct
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
        self._head: Head | None = None  # of a request that needs no app, until its body is here
        self._body = b""
        self._found: Head | None = None  # by the parser, in the bytes that came last
        self._is_between = True  # two messages, as far as the parser has seen them
        self._idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._joined = JoinedWrites(transport, self.loop)
        super().connection_made(self._joined)  # type: ignore[arg-type] # one in all but its class
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
        if self._is_refused or (self._is_between and self._takes_direct and self._start_known(data)):
            return
        was_between, self._found = self._is_between, None
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
            if self._head is not None:  # its body is still to come
                self._go_through_the_app()
            if was_between:
                self._remember(data)
            if self._since and self._patience is None and self._is_free:
                self._wait_for_head()

    def _remember(self, data: bytes) -> None:
        if self._found is not None:
            self._host.direct.heads.remember(data, self._found)

    @property
    def _is_free(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def _takes_direct(self) -> bool:
        """False while a request is under way, or answers wait for their caller to read: the app waits for that."""
        return self._is_free and not self.flow.write_paused

    def _start_known(self, data: bytes) -> bool:
        """Start what these bytes ask for, where they are one request whose head has come before; say whether."""
        known = self._host.direct.heads.find(data)
        if known is not None:
            self._stop_waiting()
            self._has_asked = True
            self._start(*known)
        return known is not None

    def _start(self, head: Head, body: bytes) -> None:
        exchange = Exchange(keep_alive=not self._host.closes_next())
        self.cycle = exchange  # type: ignore[assignment] # has what is asked of one
        self._when_gone = exchange.leave
        self._host.direct.take(head, body, exchange, self)

    def on_message_begin(self) -> None:
        self.url, self.headers, self.expect_100_continue = b"", [], False  # a scope is made where the app gets one
        self._is_between = False

    def on_headers_complete(self) -> None:
        if self._since > self._host.max_head_bytes:  # or it came in one piece with its body
            self._check_size(len(self.url) + sum(len(name) + len(value) for name, value in self.headers))
        self._since = 0
        self._stop_waiting()
        self._has_asked = True
        self._head = self._read_head()
        if self._head is None:
            self._go_through_the_app()

    def _read_head(self) -> Head | None:
        direct, parser = self._host.direct, self.parser
        if not (
            direct.is_open and self._takes_direct and parser.should_keep_alive() and parser.get_http_version() == "1.1"
        ):
            return None
        return direct.heads.read(parser.get_method(), self.url, self.headers)

    def _go_through_the_app(self) -> None:
        self._head = None
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
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
        if self._head is not None and len(body) == self._head.length:
            self._body = body
            return
        if self._head is not None:
            self._go_through_the_app()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._since = 0
        self._is_between = True
        if self._head is None:
            super().on_message_complete()
            return
        head, body = self._head, self._body
        self._found, self._head, self._body = head, None, b""
        self._start(head, body)

    def run(self, serving: Coroutine[Any, Any, None]) -> None:
        """Run what serves a request; the server waits for it when it ends."""
        task = self.loop.create_task(serving)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def reply(self, exchange: Exchange, status: int, fields: Fields, content: bytes) -> None:
        """Send an answer, unless its caller has gone."""
        self._when_gone = None
        exchange.response_complete = True
        if exchange.disconnected:
            return
        closes = not exchange.keep_alive or CLOSE in fields
        lines = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *fields):
            lines += (name, b": ", value, b"\r\n")
        if not exchange.keep_alive:
            lines.append(b"connection: close\r\n")
        lines += (b"\r\n", content)
        self._joined.write_at_once(b"".join(lines))
        if closes:
            self.transport.close()
        if self.timeout_keep_alive_task is None or self.pipeline:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1
            self._idle_since = self.loop.time()

    def since_last_byte_s(self) -> float:
        """Return how long ago the last byte came, seconds."""
        return seconds_since_last_byte(self.transport)

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        """Close where nothing has come for so long; one timer goes on from request to request."""
        self.timeout_keep_alive_task = None
        left_s = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if not self._is_free:
            return  # the answer sets it anew
        if left_s > TICK_S:
            self.timeout_keep_alive_task = self.loop.call_later(left_s, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

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
