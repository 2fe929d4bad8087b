"""One usual call of /predict while it is under way: what was asked, who asks, what is held until it is answered."""

from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any, Protocol, TypeVar

from service.classifier import Classifier
from service.errors import ServiceError
from service.logs import REQUEST, RequestNames
from service.preparing import Prepared
from service.routes.heads import Fields, Head
from service.routes.shortcut import PATH, ROUTE

Resource = TypeVar("Resource")


class Exchange:
    """A request and its answer under way, as uvicorn's connection sees them; its body is here already."""

    more_body = False
    response_started = False

    def __init__(self, *, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.response_complete = False
        self.disconnected = False
        self.on_leave: Callable[[], object] | None = None  # while there is something to call off

    @property
    def message_event(self) -> "Exchange":
        """What uvicorn sets for who waits for more of the body: nobody does."""
        return self

    def set(self) -> None:
        """Wake nobody."""

    def leave(self) -> None:
        """Let the request end: its caller has gone."""
        self.disconnected = True
        if self.on_leave is not None:
            self.on_leave()


class Caller(Protocol):
    """Who waits for an answer."""

    def reply(self, exchange: Exchange, status: int, fields: Fields, content: bytes) -> None:
        """Send the answer."""

    def since_last_byte_s(self) -> float:
        """Return how long ago the last byte of the request came, seconds."""

    def run(self, serving: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that the server waits for when it ends."""

    def give_up(self, error: BaseException) -> None:
        """Hear that there will be no answer, for one could not be made."""


class Call:
    """One request on its way. `held` is what it holds until it is answered; the last to come goes first."""

    __slots__ = (
        *("body", "caller", "deadline", "exchange", "fault", "head"),
        *("held", "names", "prepared", "scope", "started"),
    )

    def __init__(self, head: Head, body: bytes, exchange: Exchange, caller: Caller, names: RequestNames) -> None:
        self.head = head
        self.body = body
        self.exchange = exchange
        self.caller = caller
        self.started = perf_counter()
        self.names = names
        self.deadline = 0.0  # once it is prepared
        self.scope: dict[str, Any] = {"method": head.method, "path": PATH, "route": ROUTE, "state": {}}
        self.scope[REQUEST.name] = names
        self.held: list[AbstractContextManager[object]] = []
        self.prepared: Prepared | ServiceError | None = None
        self.fault: Exception | None = None

    @property
    def classifier(self) -> Classifier:
        """What answers it, once that is chosen."""
        classifier: Classifier = self.scope["state"]["classifier"]
        return classifier

    def hold(self, resource: AbstractContextManager[Resource]) -> Resource:
        """Hold a resource until it is answered. Raises as the resource does."""
        entered = resource.__enter__()
        self.held.append(resource)
        return entered

    def release(self) -> None:
        """Hold nothing any more."""
        while self.held:
            self.held.pop().__exit__(None, None, None)
