"""What is said of each request: its id, its count, its log line, its trace; around the app, one bare ASGI layer."""

import asyncio
import itertools
import logging
import re
import secrets
from collections.abc import Callable, Iterable
from contextvars import Context
from time import perf_counter
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.logs import FIELDS, REQUEST, RequestNames
from service.metrics import Metrics
from service.tracing import Tracing

UNMATCHED = "unmatched"  # the route of what no route is for
REASON = "foldserve.reason"  # in the scope: the name of the problem that is the answer
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
TRACE_PARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

LATE = 504
LATE_EVERY_S = 10.0  # between two lines about deadlines that passed; each is counted in the metrics
ASKING = frozenset({"POST", "PUT"})  # the methods of requests that a model answers

HeadersOf = Callable[[Scope], Iterable[tuple[bytes, bytes]]]
Which = Literal["none", "errors", "all"]
logger = logging.getLogger(__name__)


class Observing:
    """Names, counts and logs requests, whichever way they are answered."""

    def __init__(
        self, metrics: Metrics, tracing: Tracing, log_requests: Which, late_every_s: float = LATE_EVERY_S
    ) -> None:
        self.tracing = tracing
        self._metrics = metrics
        # The system is asked once: at each request it would be without the interpreter's lock. An id is no secret.
        self._ids = map(f"{secrets.token_hex(8)}{{:016x}}".format, itertools.count(secrets.randbits(48)))
        self._late, self._late_every_s, self._is_told_of_late = 0, late_every_s, False
        self._is_told = {"none": _never, "errors": _is_our_fault, "all": _always}[log_requests]

    def names_of(self, headers: list[tuple[bytes, bytes]]) -> RequestNames:
        """Return the names that the caller gave, with a new id where there is none."""
        request_id, trace_id = given_names(headers)
        return RequestNames(request_id or self.new_id(), trace_id)

    def new_id(self) -> str:
        """Return a name for a request that came without one."""
        return next(self._ids)

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """Tell of a request that is answered, `seconds` after its head came."""
        route, reason = route_of(scope), scope.get(REASON, "ok")
        self._metrics.request(route, status, reason)
        if scope["method"] in ASKING and (classifier := scope.get("state", {}).get("classifier")) is not None:
            classifier.metrics.request(seconds, is_ok=status < 400)
        self.tracing.answered(route, status, reason)
        if status == LATE and self._is_told is _is_our_fault:
            self._count_late()
        if self._is_told(status):
            fields = {"method": scope["method"], "route": route, "status": status, "reason": reason}
            fields["milliseconds"] = round(1000 * seconds, 3)
            text = "%s %s %d %s in %.1f ms"
            values = (scope["method"], route, status, reason, 1000 * seconds)
            logger.log(logging.ERROR if _is_our_fault(status) else logging.INFO, text, *values, extra={FIELDS: fields})

    def _count_late(self) -> None:
        """Warn of late answers with their number: of the first at once, of those after it together."""
        self._late += 1
        if not self._is_told_of_late:
            self.tell_of_late()

    def tell_of_late(self) -> None:
        """Tell of late answers that no line has told of yet."""
        self._is_told_of_late = self._late > 0
        if self._late:
            text = "answers of 504, whose deadlines passed before they could be given, since the last such line: %d"
            logger.warning(text, self._late, extra={FIELDS: {"status": LATE, "count": self._late}})
            self._late = 0
            loop = asyncio.get_running_loop()
            loop.call_later(self._late_every_s, self.tell_of_late, context=Context())  # of no request by name


class ObserveRequests:
    """The layer around the app that sees every request; `headers_of` says what else its answer names.

    Starlette's own kind of layer costs more than the answer.
    """

    def __init__(self, app: ASGIApp, observing: Observing, headers_of: HeadersOf) -> None:
        self._app = app
        self._observing = observing
        self._headers_of = headers_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        names = self._observing.names_of(scope["headers"])
        scope[REQUEST.name] = names
        token = REQUEST.set(names)
        started = perf_counter()

        async def observing_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = (*self._headers_of(scope), (b"x-request-id", names.request_id.encode()))
                message = {**message, "headers": [*message.get("headers", ()), *more]}
                self._observing.answered(scope, message["status"], perf_counter() - started)
            await send(message)

        try:
            with self._observing.tracing.request(scope):
                await self._app(scope, receive, observing_send)
        finally:
            REQUEST.reset(token)


def _is_our_fault(status: int) -> bool:
    # Not ready is a state, whose probes would fill the log. A deadline is the caller's, and a crowd misses thousands.
    return status >= 500 and status not in {503, LATE}


def _always(_: int) -> bool:
    return True


def _never(_: int) -> bool:
    return False


def route_of(scope: Scope) -> str:
    """Return the route's pattern, never the path that was sent, which may hold anything."""
    path = getattr(scope.get("route"), "path", None) or scope.get("root_path")  # below which files are mounted
    return str(path or UNMATCHED)


def given_names(headers: list[tuple[bytes, bytes]]) -> tuple[str | None, str | None]:
    """Return the id that the caller gave, and the trace id of a sound `traceparent` (W3C, level 1), each or None."""
    sent, parent = b"", b""
    for name, value in headers:
        if name == b"x-request-id":
            sent = value
        elif name == b"traceparent":
            parent = value
    trace = TRACE_PARENT.fullmatch(parent)
    return sent.decode() if REQUEST_ID.fullmatch(sent) else None, trace[1].decode() if trace else None
