"""What is said of each request: its id, its count, its log line, its trace. One bare ASGI layer around the app."""

import asyncio
import logging
import random
import re
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


class ObserveRequests:
    """Names, counts, logs and traces every request; `headers_of` says what else its answer names.

    Starlette's own kind of layer costs more than the answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        tracing: Tracing,
        log_requests: Which,
        headers_of: HeadersOf,
        late_every_s: float = LATE_EVERY_S,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._headers_of = headers_of
        # Seeded by the system, which would otherwise be asked at each request, without the interpreter's lock.
        self._ids = random.Random()  # noqa: S311 - an id is no secret
        self._late, self._late_every_s, self._is_told_of_late = 0, late_every_s, False
        self._is_told = {"none": _never, "errors": _is_our_fault, "all": _always}[log_requests]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        names = names_of(scope["headers"], self._ids)
        scope[REQUEST.name] = names
        token = REQUEST.set(names)
        started = perf_counter()

        async def observing_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = (*self._headers_of(scope), (b"x-request-id", names.request_id.encode()))
                message = {**message, "headers": [*message.get("headers", ()), *more]}
                self._tell(scope, message["status"], perf_counter() - started)
            await send(message)

        try:
            with self._tracing.request(scope):
                await self._app(scope, receive, observing_send)
        finally:
            REQUEST.reset(token)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        route, reason = route_of(scope), scope.get(REASON, "ok")
        self._metrics.request(route, status, reason)
        if scope["method"] in ASKING and (classifier := scope.get("state", {}).get("classifier")) is not None:
            classifier.metrics.request(seconds, is_ok=status < 400)
        self._tracing.answered(route, status, reason)
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
            self._tell_of_late()

    def _tell_of_late(self) -> None:
        self._is_told_of_late = self._late > 0
        if self._late:
            text = "answers of 504, whose deadlines passed before they could be given, since the last such line: %d"
            logger.warning(text, self._late, extra={FIELDS: {"status": LATE, "count": self._late}})
            self._late = 0
            loop = asyncio.get_running_loop()
            loop.call_later(self._late_every_s, self._tell_of_late, context=Context())  # of no request by name


def _is_our_fault(status: int) -> bool:
    # Not ready is a state, whose probes would fill the log. A deadline is the caller's, and a crowd misses thousands.
    return status >= 500 and status not in {503, LATE}


def _always(_: int) -> bool:
    return True


def _never(_: int) -> bool:
    return False


def route_of(scope: Scope) -> str:
    """Return the route's pattern, never the path that was sent, which may hold anything."""
    return str(getattr(scope.get("route"), "path", UNMATCHED))


def names_of(headers: list[tuple[bytes, bytes]], ids: random.Random) -> RequestNames:
    """Return the id that the caller gave, or a new one, and the trace id of a sound `traceparent` (W3C, level 1)."""
    sent, parent = b"", b""
    for name, value in headers:
        if name == b"x-request-id":
            sent = value
        elif name == b"traceparent":
            parent = value
    request_id = sent.decode() if REQUEST_ID.fullmatch(sent) else f"{ids.getrandbits(128):032x}"
    trace = TRACE_PARENT.fullmatch(parent)
    return RequestNames(request_id, trace[1].decode() if trace else None)
