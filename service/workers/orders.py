"""What one worker wants all to do: at once, or one first and the others after it."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from service.workers.channel import Message
from service.workers.handle import Handle, WorkerGone

AT_ONCE_WITHIN_S = 1.0  # a worker that is silent for longer does not hold up a scrape of the others

logger = logging.getLogger(__name__)


class Orders:
    """Carries orders from one worker to all."""

    def __init__(self, workers: Mapping[int, Handle]) -> None:
        self._workers = workers
        self._kept: dict[str, Message] = {}
        self._count = 0
        self._one_by_one = asyncio.Lock()

    def since(self, count: int = 0) -> tuple[list[Message], int]:
        """Return the orders kept after the first `count`, in order, and how many there were by now."""
        return [message for message in self._kept.values() if message["count"] > count], self._count

    def note(self, loaded: Sequence[Message]) -> None:
        """Keep what the first worker serves, for all others to serve the same."""
        for one in loaded:
            self._keep(f"model {one['order']['name']}", "load", one["order"], one["certificates"])

    async def admit(self, worker: Handle, on_admitted: Callable[[], None]) -> None:
        """Let a worker that is ready catch up with what was ordered since it started, then count it in."""
        async with self._one_by_one:
            missed, worker.knows = self.since(worker.knows)
            for message in missed:
                await self._follow(worker, message)
            if worker.state != "ended":
                on_admitted()

    async def carry_out(self, caller: Handle, call: Message) -> None:
        """Have all workers do what `caller` calls for, and answer it."""
        try:
            if call["kept_as"] is None:
                outcome = await self._at_once(caller, call)
            else:
                async with self._one_by_one:
                    outcome = await self._one_first(caller, call)
        except WorkerGone:
            return  # with the one who asked
        caller.channel.send(
            "answer",
            number=call["number"],
            **{key: outcome[key] for key in outcome.keys() & {"result", "error", "reason"}},
        )

    def _others(self, caller: Handle) -> list[Handle]:
        return [one for one in self._workers.values() if one is not caller and one.state == "ready"]

    async def _at_once(self, caller: Handle, call: Message) -> Message:
        doing = [asyncio.create_task(one.do(call["name"], call["arguments"])) for one in self._others(caller)]
        outcome = await caller.do(call["name"], call["arguments"])
        if doing:
            done, late = await asyncio.wait(doing, timeout=AT_ONCE_WITHIN_S)
            for task in late:
                task.cancel()
            for task in done:
                task.exception()  # a worker that ended meanwhile has nothing to add
        return outcome

    async def _one_first(self, caller: Handle, call: Message) -> Message:
        outcome = await caller.do(call["name"], call["arguments"])
        if "error" in outcome:
            return outcome
        result = {"order": call["arguments"], "certificates": [], **(outcome["result"] or {})}
        message = self._keep(call["kept_as"], call["name"], result["order"], result["certificates"])
        await asyncio.gather(*(self._follow(one, message) for one in self._others(caller)))
        return {"result": None}

    def _keep(self, kept_as: str, name: str, arguments: Message, certificates: list[Any]) -> Message:
        self._count += 1
        self._kept.pop(kept_as, None)  # the last order comes last
        message = {"name": name, "arguments": arguments, "certificates": certificates, "count": self._count}
        self._kept[kept_as] = message
        return message

    async def _follow(self, worker: Handle, call: Message) -> None:
        try:
            outcome = await worker.do(call["name"], call["arguments"], call["certificates"])
        except WorkerGone:
            return  # its successor catches up
        if "error" in outcome:
            logger.error("worker %d cannot follow in %s: %s", worker.number, call["name"], outcome["reason"])
            worker.reason = f"it could not follow in {call['name']}: {outcome['reason']}"
            worker.kill()  # two answers under one address are worse than one worker less for a second
