"""The usual call of /predict, answered where its bytes arrive, without ASGI: its messages cost more than decoding.

Errors, headers, counts and log lines are those of the way through the app. What arrives in one turn of the event loop
is checked and decoded together: one by one, with all else in between, the same code takes longer.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from time import perf_counter
from typing import Any, Final, Protocol

from fastapi import Response

from service.admission import Admitted
from service.classifier import Prepared
from service.errors import CallerGone, ServiceError
from service.inference import Service
from service.logs import REQUEST, RequestNames
from service.observing import Observing
from service.opening import Opened
from service.routes import certificate_headers
from service.routes.access import check_key
from service.routes.connection import GONE
from service.routes.heads import Fields, Head, Heads
from service.routes.predict import MEDIA_TYPE, write_answer
from service.routes.shortcut import PATH, ROUTE
from service.security import KeyRing

NO_FILE_NAME: Final = (None,)


class Exchange:
    """A request and its answer under way, as uvicorn's connection sees them; its body is here already."""

    more_body = False
    response_started = False

    def __init__(self, *, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.response_complete = False
        self.disconnected = False
        self.task: asyncio.Task[None] | None = None  # once it can be cancelled

    @property
    def message_event(self) -> "Exchange":
        """What uvicorn sets for who waits for more of the body: nobody does."""
        return self

    def set(self) -> None:
        """Wake nobody."""

    def leave(self) -> None:
        """Let the request end: its caller has gone."""
        self.disconnected = True
        if self.task is not None:
            self.task.cancel()


class Caller(Protocol):
    """Who waits for an answer."""

    def reply(self, exchange: Exchange, status: int, fields: Fields, content: bytes) -> None:
        """Send the answer."""

    def since_last_byte_s(self) -> float:
        """Return how long ago the last byte of the request came, seconds."""

    def run(self, serving: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that the server waits for when it ends."""


class HasScope(Protocol):
    """A request as far as the app's map of errors looks at it."""

    @property
    def scope(self) -> MutableMapping[str, Any]: ...


AnswerError = Callable[[HasScope, Exception], Awaitable[Response]]


class Call:
    """One request on its way."""

    __slots__ = (
        *("body", "caller", "deadline", "exchange", "fault", "head"),
        *("opened", "prepared", "room", "scope", "started"),
    )

    def __init__(self, head: Head, body: bytes, exchange: Exchange, caller: Caller) -> None:
        self.head = head
        self.body = body
        self.exchange = exchange
        self.caller = caller
        self.started = perf_counter()
        self.deadline = 0.0  # once it is prepared
        self.scope: dict[str, Any] = {"method": head.method, "path": PATH, "route": ROUTE, "state": {}}
        self.opened: Opened | None = None
        self.room: Admitted | None = None  # held from before it is decoded
        self.prepared: Prepared | ServiceError | None = None
        self.fault: Exception | None = None


class Direct:
    """Answers calls; `answer_error` is the app's map of errors, foreseen or not."""

    def __init__(self, service: Service, keys: KeyRing, observing: Observing, answer_error: AnswerError) -> None:
        self._service = service
        self._keys = keys
        self._observing = observing
        self._answer_error = answer_error
        self._arrived: list[Call] = []
        self.heads = Heads(service.settings)

    @property
    def is_open(self) -> bool:
        """False where spans are made, whose making knows ASGI."""
        return not self._observing.tracing.is_on

    def take(self, head: Head, body: bytes, exchange: Exchange, caller: Caller) -> None:
        """Answer a call whose body is here; `caller` hears of it."""
        if not self._arrived:
            asyncio.get_running_loop().call_soon(self._begin)
        self._arrived.append(Call(head, body, exchange, caller))

    def _begin(self) -> None:
        calls, self._arrived = self._arrived, []
        for call in calls:
            self._prepare(call)
        for call in calls:
            call.caller.run(self._serve(call))

    def _prepare(self, call: Call) -> None:
        """Do what needs no waiting, in the order of the way through the app; a fault is kept for the answer."""
        head = call.head
        request_id = head.request_id or self._observing.new_id()
        call.scope[REQUEST.name] = RequestNames(request_id, head.trace_id)
        try:
            check_key(self._keys, head.fields)
            call.deadline = head.wish.deadline(call.caller.since_last_byte_s)
            opened = self._service.lease(head.query.model, head.query.version, request_id=request_id)
            call.scope["state"]["classifier"] = classifier = opened.__enter__()
            call.opened = opened
            if head.query.receipt:
                classifier.check_receipts()
            room = classifier.admit(1)
            room.__enter__()
            call.room = room
            call.prepared = classifier.prepare_at_once(call.body, call.deadline)
        except Exception as error:  # noqa: BLE001 - it is answered as any other
            call.fault = error

    async def _serve(self, call: Call) -> None:
        names = call.scope[REQUEST.name]
        REQUEST.set(names)
        call.exchange.task = asyncio.current_task()
        try:
            content, fields = await self._classify(call)
            status = 200
            fields += (MEDIA_TYPE, (b"content-length", b"%d" % len(content)))
        except asyncio.CancelledError:
            if not call.exchange.disconnected:
                raise
            status, fields, content = await self._failed(call, CallerGone(GONE))
        except Exception as error:  # noqa: BLE001 - the map of errors knows all of them
            status, fields, content = await self._failed(call, error)
        finally:
            call.exchange.task = call.fault = None  # whose frames hold the call
            if call.room is not None:
                call.room.__exit__()
            if call.opened is not None:
                call.opened.__exit__()
        fields += certificate_headers(call.scope)
        fields.append((b"x-request-id", names.request_id.encode()))
        self._observing.answered(call.scope, status, perf_counter() - call.started)
        call.caller.reply(call.exchange, status, fields, content)

    async def _classify(self, call: Call) -> tuple[bytes, Fields]:
        if call.exchange.disconnected:
            if isinstance(call.prepared, Prepared):
                call.scope["state"]["classifier"].metrics.dropped("cancelled")
            raise CallerGone(GONE)
        if call.fault is not None:
            raise call.fault
        head, service = call.head, self._service
        classifier = call.scope["state"]["classifier"]
        with service.receiving(head.length):
            classifier.metrics.observe("read", 0.0)
            outcome = await classifier.classify_one(
                call.body, deadline=call.deadline, priority=head.wish.priority, prepared=call.prepared
            )
        held_tags = head.fields.get("if-none-match", "")
        return write_answer(classifier, service, head.query, NO_FILE_NAME, (outcome,), held_tags)

    async def _failed(self, call: Call, error: Exception) -> tuple[int, Fields, bytes]:
        response = await self._answer_error(call, error)
        return response.status_code, response.raw_headers, bytes(response.body)
