"""One connection: whether a request of it needs the app, the answer to one that does not, and how long it is kept."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from service import bounded
from service.arrival import seconds_since_last_byte
from service.bounded import BoundedConnection
from service.routes.calls import Exchange
from service.routes.direct import Direct
from service.routes.heads import Fields, Head

TICK_S = 0.01  # the event loop's clock may be so much behind
CLOSE = (b"connection", b"close")


class Host(bounded.Host, Protocol):
    """What a connection asks of its server."""

    direct: Direct


class Connection(BoundedConnection):
    """One connection; `on_closed` hears of its end."""

    def __init__(self, host: Host, app_state: dict[str, Any], on_closed: Callable[[], None]) -> None:
        super().__init__(host, app_state, on_closed)
        self._direct = host.direct
        self._head: Head | None = None  # of a request that needs no app, until its body is here
        self._body = b""
        self._found: Head | None = None  # by the parser, in the bytes that came last
        self._is_between = True  # two messages, as far as the parser has seen them
        self._idle_since = 0.0

    def data_received(self, data: bytes) -> None:
        if self._is_between and self._takes_direct and self._start_known(data):
            return
        was_between, self._found = self._is_between, None
        super().data_received(data)
        if self._head is not None and not self._is_refused:
            self._go_through_the_app()  # its body is still to come
        if was_between:
            self._remember(data)

    @property
    def _takes_direct(self) -> bool:
        """False while a request is under way, or answers wait for their caller to read: the app waits for that."""
        return self._is_free and not self._is_refused and not self.flow.write_paused

    def _start_known(self, data: bytes) -> bool:
        """Start what these bytes ask for, where they are one request whose head has come before; say whether."""
        known = self._direct.heads.find(data)
        if known is not None:
            self._stop_waiting()
            self._since, self._has_asked = 0, True
            self._start(*known)
        return known is not None

    def _start(self, head: Head, body: bytes) -> None:
        exchange = Exchange(keep_alive=not self._host.closes_next())
        self.cycle = exchange  # type: ignore[assignment] # has what is asked of one
        self._when_gone = exchange.leave
        self._direct.take(head, body, exchange, self)

    def _remember(self, data: bytes) -> None:
        if self._found is not None:
            self._direct.heads.remember(data, self._found)

    def on_message_begin(self) -> None:
        if not self._is_repeating:
            self.url, self.headers, self.expect_100_continue = b"", [], False  # a scope is made where the app gets one
            self._is_between = False

    def _begin(self) -> None:
        self._head = self._read_head()
        if self._head is None:
            self._go_through_the_app()

    def _read_head(self) -> Head | None:
        direct, parser = self._direct, self.parser
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
        super()._begin()

    def on_body(self, body: bytes) -> None:
        if self._head is not None and len(body) == self._head.length:
            self._since = 0
            self._body = body
            return
        if self._head is not None:
            self._go_through_the_app()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._head is None:
            super().on_message_complete()
            self._is_between = not self.parser.should_upgrade()
            return
        self._since = 0
        self._is_between = True
        head, body = self._head, self._body
        self._found, self._head, self._body = head, None, b""
        self._start(head, body)

    def run(self, serving: Coroutine[Any, Any, None]) -> None:
        """Run what serves a request; the server waits for it when it ends."""
        task = self.loop.create_task(serving)
        self.tasks.add(task)
        task.add_done_callback(self._served)

    def _served(self, task: "asyncio.Task[None]") -> None:
        self.tasks.discard(task)
        if task.cancelled():
            self.transport.close()
        elif (error := task.exception()) is not None:
            self.give_up(error)

    def give_up(self, error: BaseException) -> None:
        """Close, for there will be no answer, and its caller would wait for ever."""
        self.transport.close()
        self.logger.error("a request was left without an answer", exc_info=error)

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
        if not exchange.keep_alive and CLOSE not in fields:
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
