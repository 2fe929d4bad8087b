"""The usual call of /predict, answered where its bytes arrive, without ASGI: its messages cost more than decoding.

Errors, headers, counts and log lines are those of the way through the app. What arrives in one turn of the event loop
is checked and decoded together: one by one, with all else in between, the same code takes longer.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from time import perf_counter
from typing import Any, Final, Protocol

from fastapi import Response

from service.classifier import Classifier, Outcome
from service.errors import CallerGone
from service.inference import Service
from service.logs import REQUEST, RequestNames
from service.observing import Observing
from service.preparing import Prepared
from service.queueing import Listening
from service.routes import certificate_headers
from service.routes.access import check_key
from service.routes.calls import Call, Caller, Exchange
from service.routes.connection import GONE
from service.routes.heads import Fields, Head, Heads
from service.routes.predict import MEDIA_TYPE, write_answer
from service.running import Logits
from service.security import KeyRing

NO_FILE_NAME: Final = (None,)


class HasScope(Protocol):
    """A request as far as the app's map of errors looks at it."""

    @property
    def scope(self) -> MutableMapping[str, Any]: ...


AnswerError = Callable[[HasScope, Exception], Awaitable[Response]]


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
        names = RequestNames(head.request_id or self._observing.new_id(), head.trace_id)
        self._arrived.append(Call(head, body, exchange, caller, names))

    def _begin(self) -> None:
        calls, self._arrived = self._arrived, []
        for call in calls:
            self._prepare(call)
        for call in calls:
            self._start(call)

    def _prepare(self, call: Call) -> None:
        """Do what needs no waiting, in the order of the way through the app; a fault is kept for the answer."""
        head, service = call.head, self._service
        try:
            check_key(self._keys, head.fields)
            call.deadline = head.wish.deadline(call.caller.since_last_byte_s)
            opened = service.lease(head.query.model, head.query.version, request_id=call.names.request_id)
            call.scope["state"]["classifier"] = classifier = call.hold(opened)
            if head.query.receipt:
                classifier.check_receipts()
            call.hold(classifier.admit(1))  # before it is decoded
            call.hold(service.receiving(head.length))
            classifier.metrics.observe("read", 0.0)
            call.prepared = classifier.prepare_at_once(call.body, call.deadline)
        except Exception as error:  # noqa: BLE001 - it is answered as any other
            call.fault = error

    def _start(self, call: Call) -> None:
        prepared = call.prepared
        if not isinstance(prepared, Prepared):
            call.caller.run(self._serve(call))
        elif call.exchange.disconnected:
            call.classifier.metrics.dropped("cancelled")
            self._answer_fault(call, CallerGone(GONE))
        else:
            self._queue(call, prepared)

    def _queue(self, call: Call, prepared: Prepared) -> None:
        """Let the model be asked; no task waits for it, whose turns would cost more than the queue."""
        hear = partial(self._hear, call, prepared)
        try:
            waiter = call.classifier.begin(prepared, hear, deadline=call.deadline, priority=call.head.wish.priority)
        except Exception as error:  # noqa: BLE001 - other calls come after this one
            hear(error)
            return
        if waiter is not None:
            call.exchange.on_leave = partial(self._leave, call, waiter)

    def _leave(self, call: Call, waiter: Listening[Any]) -> None:
        try:
            waiter.leave()
        finally:
            self._answer_fault(call, CallerGone(GONE))

    def _hear(self, call: Call, prepared: Prepared, said: Logits | Exception) -> None:
        """Answer a call by what the model said, or the error; in a lane's task, which no surprise may reach."""
        token = REQUEST.set(call.names)
        try:
            self._answer(call, prepared, said)
        except Exception as error:  # noqa: BLE001 - see above
            call.release()
            call.caller.give_up(error)
        finally:
            REQUEST.reset(token)

    def _answer(self, call: Call, prepared: Prepared, said: Logits | Exception) -> None:
        try:
            classifier = call.classifier
            answer = self._write(call, classifier, classifier.finish(call.body, prepared, said))
        except Exception as error:  # noqa: BLE001 - the map of errors knows all of them
            self._answer_fault(call, error)
        else:
            self._reply(call, 200, *answer)

    def _answer_fault(self, call: Call, error: Exception) -> None:
        call.fault, call.exchange.on_leave = error, None
        call.caller.run(self._serve(call))

    async def _serve(self, call: Call) -> None:
        """Answer a call that has to wait for more than the model, or its fault."""
        REQUEST.set(call.names)
        task = asyncio.current_task()
        call.exchange.on_leave = None if task is None else task.cancel
        try:
            answer = 200, *await self._classify(call)
        except asyncio.CancelledError:
            if not call.exchange.disconnected:
                raise
            answer = await self._failed(call, CallerGone(GONE))
        except Exception as error:  # noqa: BLE001 - the map of errors knows all of them
            answer = await self._failed(call, error)
        finally:
            call.release()
        self._reply(call, *answer)

    async def _classify(self, call: Call) -> tuple[Fields, bytes]:
        if call.exchange.disconnected:
            raise CallerGone(GONE)
        if call.fault is not None:
            raise call.fault
        classifier = call.classifier
        outcome = await classifier.classify_one(
            call.body, deadline=call.deadline, priority=call.head.wish.priority, prepared=call.prepared
        )
        return self._write(call, classifier, outcome)

    def _write(self, call: Call, classifier: Classifier, outcome: Outcome) -> tuple[Fields, bytes]:
        query, held_tags = call.head.query, call.head.fields.get("if-none-match", "")
        content, fields = write_answer(classifier, self._service, query, NO_FILE_NAME, (outcome,), held_tags)
        return [*fields, MEDIA_TYPE, (b"content-length", b"%d" % len(content))], content

    def _reply(self, call: Call, status: int, fields: Fields, content: bytes) -> None:
        call.exchange.on_leave = call.fault = None  # which lead back to the call
        call.release()
        fields += certificate_headers(call.scope)
        fields.append((b"x-request-id", call.names.request_id.encode()))
        self._observing.answered(call.scope, status, perf_counter() - call.started)
        call.caller.reply(call.exchange, status, fields, content)

    async def _failed(self, call: Call, error: Exception) -> tuple[int, Fields, bytes]:
        response = await self._answer_error(call, error)
        return response.status_code, response.raw_headers, bytes(response.body)
