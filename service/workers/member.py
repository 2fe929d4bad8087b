"""A worker's crew: what it knows of the whole, and how it tells all, through its supervisor."""

import asyncio
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from service import errors
from service.crew import Order, View
from service.errors import FoldserveError
from service.independence.certificate import Certificate
from service.workers.channel import Channel, Message

logger = logging.getLogger(__name__)


class Member:
    """One of several processes: a `service.crew.Crew` over a channel. `start` is the supervisor's first word."""

    def __init__(self, channel: Channel, start: Message) -> None:
        self._channel = channel
        self._orders: dict[str, Order] = {}
        orders: list[Message] = start["orders"]  # what all others did before this one started
        loads = [one["arguments"] for one in orders if one["name"] == "load"]
        self.loaded: Sequence[Mapping[str, Any]] | None = loads if orders else None
        self._to_do = [one for one in orders if one["name"] not in {"load", "unload"}]
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._working: set[asyncio.Task[None]] = set()
        self.number: int | None = start["number"]
        self.view: View | None = View(**start["view"])
        made = [Certificate.model_validate(one) for one in start["certificates"]]
        self.certificates: dict[str, Certificate] = {one.fingerprint_digest: one for one in made}

    def on(self, name: str, order: Order) -> None:
        """Let `order` be what `tell_all(name, …)` does in this process."""
        self._orders[name] = order

    async def joined(self, loaded: Sequence[Mapping[str, Any]]) -> None:
        """Catch up with the other orders that all have carried out, then tell the supervisor."""
        for message in self._to_do:
            await self._orders[message["name"]](message["arguments"])
        self._channel.send("ready", loaded=list(loaded))

    def leave(self, reason: str) -> None:
        """Tell the supervisor to hand over nothing more."""
        self._channel.send("leaving", reason=reason)

    async def tell_all(self, name: str, arguments: Mapping[str, Any], *, kept_as: str | None = None) -> Any:
        """Have every process carry out an order, as `Crew.tell_all` says."""
        number = next(self._numbers)
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        self._channel.send("call", number=number, name=name, arguments=dict(arguments), kept_as=kept_as)
        try:
            return await answer
        finally:
            del self._calls[number]

    def heed(self, message: Message) -> None:
        """Act on a message of the supervisor."""
        match message["kind"]:
            case "view":
                self.view = View(**message["view"])
            case "do":
                self._do(message)
            case "answer":
                _settle(self._calls.get(message["number"]), message)

    def _do(self, message: Message) -> None:
        task = asyncio.create_task(self._carry_out(message))
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _carry_out(self, message: Message) -> None:
        for one in message.get("certificates", ()):
            made = Certificate.model_validate(one)
            self.certificates[made.fingerprint_digest] = made
        try:
            result = await self._orders[message["name"]](message["arguments"])
        except FoldserveError as error:
            outcome = {"error": type(error).__name__, "reason": str(error)}
        except Exception as error:  # the one who asked gets to know, and this process goes on
            logger.exception("an order failed in a way that nobody foresaw")
            outcome = {"error": "InferenceFailed", "reason": f"{message['name']} failed: {error}"}
        else:
            outcome = {"result": result}
        self._channel.send("done", number=message["number"], **outcome)


def _settle(answer: asyncio.Future[Any] | None, message: Message) -> None:
    if answer is None or answer.done():
        return
    if "error" in message:
        answer.set_exception(error_of(message))
    else:
        answer.set_result(message["result"])


def error_of(message: Message) -> FoldserveError:
    """Return the error that another process told of."""
    kind: type[FoldserveError] = getattr(errors, message["error"], FoldserveError)
    return errors.NotReady(message["reason"], retry_after_s=1) if kind is errors.NotReady else kind(message["reason"])
