"""A worker as its supervisor sees it: a process, a channel, and how many connections it holds."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from service.config import environment_with
from service.workers.channel import Channel, Message, hand_over
from service.workers.kills import Kills

PROGRAM = (sys.executable, "-m", "service.workers.worker")

MOST_HANDED = 64  # connections on their way to a worker; a socket pair holds some 270, and then refuses
State = Literal["starting", "up", "ready", "leaving", "ended"]


class WorkerGone(Exception):
    """The worker ended before it could do what it was told."""


class Handle:
    """A worker process. `ended` is set once it has."""

    def __init__(
        self, number: int, process: subprocess.Popen[bytes], channel: Channel, handoff: socket.socket, kills: Kills
    ) -> None:
        self.number = number
        self.process = process
        self.channel = channel
        self.state: State = "starting"
        self.reason = ""  # why it left, in its own words
        self.error = ""  # the error it left with
        self.knows = 0  # so many kept orders
        self.open_connections = 0
        self.heard_at = time.monotonic()
        self._kills = kills
        self._cause = ""  # of a kill that was not ours
        self._is_killed_here = False
        self.ended = asyncio.Event()
        self._handoff = handoff
        self._handed: deque[socket.socket] = deque()  # not yet taken; kept, for a worker may die before it takes them
        self._numbers = itertools.count()
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._pidfd = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @classmethod
    async def start(cls, number: int, metrics: str, kills: Kills, program: Sequence[str] = PROGRAM) -> "Handle":
        """Start a worker; `metrics` is the folder where the workers keep their counters."""
        control, its_control = socket.socketpair()
        handoff, its_handoff = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        its = (its_control.fileno(), its_handoff.fileno())
        process = subprocess.Popen(  # noqa: S603, ASYNC220 - starting a process takes a millisecond
            [*program, *map(str, its)], pass_fds=its, env=environment_with(PROMETHEUS_MULTIPROC_DIR=metrics)
        )
        kills.started(process)
        its_control.close()
        its_handoff.close()
        handoff.setblocking(False)
        return cls(number, process, await Channel.over(control), handoff, kills)

    def has_room(self, most: int) -> bool:
        """True while the worker can take one more of `most` connections, and is not behind in taking them."""
        return self.open_connections < most and len(self._handed) < MOST_HANDED

    def hand(self, connection: socket.socket) -> bool:
        """Hand a connection over and return True, or False where the worker cannot take it now.

        It is closed here once the worker says that it took it, before it read a byte.
        """
        try:
            hand_over(connection, self._handoff)
        except OSError:
            return False
        self.open_connections += 1
        self._handed.append(connection)
        return True

    def left_over(self) -> list[socket.socket]:
        """Return the connections that a worker that has ended never took: another can have them, with all they sent."""
        left, self._handed = list(self._handed), deque()
        return left

    async def do(self, name: str, arguments: dict[str, Any], certificates: Sequence[Any] = ()) -> Message:
        """Have the worker carry out an order; return its outcome. Raises WorkerGone."""
        number = next(self._numbers)
        outcome = self._pending[number] = asyncio.get_running_loop().create_future()
        if self.state == "ended":
            raise WorkerGone
        self.channel.send("do", number=number, name=name, arguments=arguments, certificates=list(certificates))
        try:
            answer: Message = await outcome
            return answer
        finally:
            self._pending.pop(number, None)

    async def messages(self) -> AsyncIterator[Message]:
        """Yield what the worker says, but for the outcomes of orders, until it is gone."""
        async for message in self.channel.messages():
            self.heard_at = time.monotonic()
            match message["kind"]:
                case "done":
                    self._settle(message)
                case "taken":
                    for _ in range(message["count"]):
                        self._handed.popleft().close()
                    yield message
                case _:
                    yield message

    def _settle(self, message: Message) -> None:
        outcome = self._pending.get(message["number"])
        if outcome is not None and not outcome.done():
            outcome.set_result(message)

    def kill(self) -> None:
        """End it at once."""
        self._is_killed_here |= self.process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)

    @property
    def end(self) -> str:
        """How it ended, in words."""
        status = self.process.returncode
        if status is None or status >= 0:
            how = f"ended with exit status {status}"
        else:
            how = f"was killed by {signal.Signals(-status).name}"
            how += self._cause if -status == signal.SIGKILL else ""
        return f"{how}: {self.reason}" if self.reason else how

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.process.wait()
        cause = self._kills.cause(self.process)
        self._cause = "" if self._is_killed_here else cause
        self.state = "ended"
        self._handoff.close()
        self.channel.close()
        for outcome in self._pending.values():
            if not outcome.done():
                outcome.set_exception(WorkerGone())
        self.ended.set()
