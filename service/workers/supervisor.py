"""Accepts connections, hands each to the worker with the fewest, and keeps the workers alive and of one mind.

    first worker: load, certify ── the others take its certificates over ── all ready: the service is
    a worker that dies is replaced, later each time; too many deaths in a row end the service with a reason

Loads neither the models nor the runtime, so it costs little and outlives what kills a worker.
"""

import asyncio
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from service import errors
from service.cgroup import ControlGroup
from service.config import Settings
from service.errors import FoldserveError, WorkersLost
from service.listening import Acceptor, Room, connections_possible, listen
from service.memory import check_after_loading
from service.problems import NO_ROOM
from service.workers.channel import Message
from service.workers.handle import PROGRAM, Handle
from service.workers.kills import Kills
from service.workers.orders import Orders

PING_EVERY_S = 1.0
START_WITHIN_S = 120.0  # for a new process to load its libraries, before a word is expected of it
END_WITHIN_S = 5.0  # beyond the drain, before a worker is killed
DEATHS, WITHIN_S = 5, 60.0  # so many deaths within so long, and it is no accident
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 10.0  # before a worker is replaced; twice as long after each death
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder made in it has a name of its own and is this user's

logger = logging.getLogger(__name__)


def supervise(settings: Settings, program: Sequence[str] = PROGRAM) -> None:
    """Serve with several workers until SIGTERM or SIGINT, then end as `service.server.OneProcess` does.

    Raises AddressUnavailable, what the first worker failed at, or WorkersLost.
    """
    listener = listen(settings)
    host, port = listener.getsockname()[:2]
    logger.info(
        "listening on http://%s:%d (API at /docs); %d workers load %s", host, port, settings.workers, settings.models
    )
    folder = tempfile.mkdtemp(prefix="foldserve-", dir=SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None)
    try:
        asyncio.run(_supervise(settings, listener, folder, program))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    logger.info("drained and stopped")


async def _supervise(settings: Settings, listener: socket.socket, folder: str, program: Sequence[str]) -> None:
    await Supervisor(settings, listener, folder, program).run()


class Supervisor:
    """Several workers, one service."""

    def __init__(self, settings: Settings, listener: socket.socket, folder: str, program: Sequence[str]) -> None:
        self._settings = settings
        self._folder = folder
        self._program = program
        self._most = connections_possible(settings.max_connections)
        self._workers: dict[int, Handle] = {}
        self._orders = Orders(self._workers)
        self._kills = Kills(ControlGroup())
        self._deaths: deque[float] = deque(maxlen=DEATHS)
        self._was_ready = False
        self._is_ending = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._homeless: deque[socket.socket] = deque()  # accepted, and their worker died before it took them
        self._acceptor = Acceptor(listener, self._room, self._deliver, NO_ROOM)

    async def run(self) -> None:
        """Serve to the end. Raises what ended the service for good."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._end, number)
        self._acceptor.open()
        self._spawn(self._keep(0))
        self._spawn(self._watch())
        try:
            await self._over
        finally:
            self._acceptor.close()
            for worker in self._workers.values():
                worker.kill()

    # The life of one worker

    async def _keep(self, number: int) -> None:
        """Keep worker `number` alive until the service ends."""
        wait_s = FIRST_WAIT_S
        while not self._is_ending:
            born = time.monotonic()
            worker = await self._start(number)
            await asyncio.gather(self._heed(worker), worker.ended.wait())
            self._tell_view()
            self._homeless.extend(worker.left_over())
            self._accept_more()
            self._bury(worker)
            wait_s = FIRST_WAIT_S if time.monotonic() - born > WITHIN_S else wait_s
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    async def _start(self, number: int) -> Handle:
        worker = self._workers[number] = await Handle.start(number, self._folder, self._kills, self._program)
        orders, worker.knows = self._orders.since()
        worker.channel.send(
            "start",
            settings=self._settings.to_json(),
            number=number,
            view=self._view(),
            certificates=[one for order in orders for one in order["certificates"]],
            orders=orders,
        )
        return worker

    def _bury(self, worker: Handle) -> None:
        """Note a death. One before the service was ever ready, or one too many, ends the service."""
        told = f"worker {worker.number} {worker.end}"
        if self._is_ending:
            return
        if worker.process.returncode == 0:  # somebody told it to go
            logger.info("%s; it is replaced", told)
            return
        self._deaths.append(time.monotonic())
        if not self._was_ready:
            kind = getattr(errors, worker.error, WorkersLost) if worker.error else WorkersLost
            self._give_up(kind(worker.reason) if worker.error else WorkersLost(f"{told}, before it was ready"))
        elif len(self._deaths) == DEATHS and self._deaths[-1] - self._deaths[0] < WITHIN_S:
            self._give_up(WorkersLost(f"{DEATHS} workers died within {WITHIN_S:g} s; the last: {told}"))
        else:
            logger.error("%s; it is replaced, the others serve", told)

    async def _heed(self, worker: Handle) -> None:
        async for message in worker.messages():
            match message["kind"]:
                case "up":
                    worker.state = "up"
                case "ready":
                    self._spawn(self._orders.admit(worker, partial(self._admitted, worker, message["loaded"])))
                case "leaving" | "failed":
                    worker.state = "leaving"
                    worker.reason, worker.error = message["reason"], message.get("error", "")
                case "closed":
                    worker.open_connections -= message["count"]
                case "call":
                    self._spawn(self._carry_out(worker, message))
            if message["kind"] == "leaving":
                self._tell_view()
            self._accept_more()

    async def _carry_out(self, worker: Handle, call: Message) -> None:
        await self._orders.carry_out(worker, call)
        if call["name"] == "load":  # by now all have done so, and what is in use has grown
            check_after_loading(self._settings, ControlGroup())

    def _admitted(self, worker: Handle, loaded: list[Message]) -> None:
        if len(self._workers) < self._settings.workers:  # the first is ready: now the others
            self._orders.note(loaded)
            for number in range(len(self._workers), self._settings.workers):
                self._spawn(self._keep(number))
        worker.state = "ready"
        self._tell_view()
        self._accept_more()

    # Connections

    def _next_worker(self) -> Handle | None:
        """Return the worker with the fewest connections that has room for one: of the ready, else of those coming."""
        with_room = (worker for worker in self._able() if worker.has_room(self._most))
        return min(with_room, key=lambda worker: worker.open_connections, default=None)

    def _able(self) -> list[Handle]:
        by_state = {state: [one for one in self._workers.values() if one.state == state] for state in ("ready", "up")}
        return by_state["ready"] or by_state["up"]

    def _room(self) -> Room:
        if self._next_worker() is not None:
            return "room"
        able = self._able()  # one that is only behind in taking them will have room
        return "full" if able and all(one.open_connections >= self._most for one in able) else "wait"

    def _deliver(self, connection: socket.socket) -> bool:
        while (worker := self._next_worker()) is not None:
            if worker.hand(connection):
                return True
            worker.state = "leaving"  # it has ended, and that is about to be told
        self._homeless.append(connection)
        return True

    def _accept_more(self) -> None:
        while self._homeless and self._next_worker() is not None:
            self._deliver(self._homeless.popleft())
        self._acceptor.resume()

    def _balance(self) -> None:
        """Have the fullest worker close some connections with their next answer, for the emptiest to get them."""
        ready = sorted(
            (one for one in self._workers.values() if one.state == "ready"), key=lambda w: w.open_connections
        )
        if len(ready) > 1:
            surplus = ready[-1].open_connections - ready[0].open_connections
            for worker in ready:
                worker.channel.send("shed", count=surplus // 2 if worker is ready[-1] else 0)

    # One view

    def _view(self) -> Message:
        ready = sum(worker.state == "ready" for worker in self._workers.values())
        self._was_ready |= ready == self._settings.workers
        is_ready = self._was_ready and ready > 0 and not self._is_ending
        return {"is_ready": is_ready, "workers": self._settings.workers, "workers_ready": ready}

    def _tell_view(self) -> None:
        was_ready, view = self._was_ready, self._view()
        for worker in self._workers.values():
            worker.channel.send("view", view=view)
        if self._was_ready and not was_ready:
            logger.info("ready: %d workers", self._settings.workers)
            check_after_loading(self._settings, ControlGroup())

    # Signals and ends

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PING_EVERY_S)
            for worker in self._workers.values():
                silent_s = time.monotonic() - worker.heard_at
                allowed_s = START_WITHIN_S if worker.state == "starting" else self._settings.worker_timeout_s
                if worker.state != "ended" and silent_s > allowed_s:
                    worker.reason = f"it had been silent for {silent_s:.0f} s"
                    worker.kill()
                worker.channel.send("ping")
            self._balance()

    def _end(self, number: signal.Signals) -> None:
        if self._is_ending:
            logger.warning("a second signal: ending at once")
            for worker in self._workers.values():
                worker.kill()
            self._finish(WorkersLost("ended by a second signal; what was in hand is lost"))
            return
        self._is_ending = True
        grace_s = self._settings.grace_s if number == signal.SIGTERM else 0.0
        logger.info("%s: not ready any more; draining in %g s", number.name, grace_s)
        self._tell_view()
        for worker in self._workers.values():
            worker.channel.send("retire")
        self._spawn(self._drain(grace_s))

    async def _drain(self, grace_s: float) -> None:
        await asyncio.sleep(grace_s)
        self._acceptor.close()
        workers = [worker for worker in self._workers.values() if worker.state != "ended"]
        for worker in workers:
            worker.channel.send("drain")
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s + END_WITHIN_S):
                await asyncio.gather(*(worker.ended.wait() for worker in workers))
        except TimeoutError:
            self._finish(WorkersLost("a worker did not end in time"))
            return
        bad = next((worker for worker in workers if worker.process.returncode), None)
        self._finish(WorkersLost(f"worker {bad.number} {bad.end}") if bad else None)

    def _give_up(self, error: FoldserveError) -> None:
        self._is_ending = True
        self._finish(error)

    def _finish(self, error: FoldserveError | None) -> None:
        if self._over.done():
            return
        if error is None:
            self._over.set_result(None)
        else:
            self._over.set_exception(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._over.done():
            self._over.set_exception(error)
