"""One worker: the service on connections that its supervisor hands over. Started as `python -m service.workers.worker`.

It ends when it is told to, when its service fails, and when its supervisor is gone.
"""

import asyncio
import json
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable

import uvloop

from service import logs
from service.config import Settings
from service.errors import FoldserveError
from service.serving import Serving
from service.workers.channel import Channel, Message, receive_connections
from service.workers.member import Member

logger = logging.getLogger(__name__)


def main() -> int:
    """Serve over the two sockets whose descriptors are the arguments; return the exit status."""
    control, connections = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a person's Ctrl-C goes to the whole group; the supervisor heeds it
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(control, connections))


async def _serve(control: socket.socket, connections: socket.socket) -> int:
    channel = await Channel.over(control)
    messages = channel.messages()
    start = await anext(messages, None)
    if start is None:
        return 1
    settings = Settings(**json.loads(start["settings"]))
    logs.configure(settings.log_level, settings.log_format)
    worker = Worker(settings, channel, connections, Member(channel, start))
    try:
        await worker.run(messages)
    except FoldserveError as error:
        channel.send("failed", reason=str(error), error=type(error).__name__)
        return 1
    finally:
        await channel.flush()
    return 0


class Worker:
    """The service, and what its supervisor tells it."""

    def __init__(self, settings: Settings, channel: Channel, connections: socket.socket, member: Member) -> None:
        self._channel = channel
        self._connections = connections
        self._member = member
        self._serving = Serving(settings, member, self._closed)
        self._newly_closed = 0

    async def run(self, messages: AsyncIterator[Message]) -> None:
        """Serve to the end. Raises what ended the service for good."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._leave)
        listening = asyncio.create_task(self._listen(messages))
        self._connections.setblocking(False)
        try:
            await self._serving.run(self._up)
        finally:
            loop.remove_reader(self._connections)
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    def _up(self) -> None:
        asyncio.get_running_loop().add_reader(self._connections, self._take)
        self._channel.send("up")

    def _take(self) -> None:
        handed = receive_connections(self._connections)
        self._channel.send("taken", count=len(handed.connections) + handed.lost)  # before a byte of them is read
        for connection in handed.connections:
            self._serving.http.take(connection)
        for _ in range(handed.lost):
            self._closed()
        if handed.is_over:
            asyncio.get_running_loop().remove_reader(self._connections)

    def _closed(self) -> None:
        if self._newly_closed == 0:  # one message for all that close in this turn of the loop
            asyncio.get_running_loop().call_soon(self._tell_closed)
        self._newly_closed += 1

    def _tell_closed(self) -> None:
        self._channel.send("closed", count=self._newly_closed)
        self._newly_closed = 0

    def _leave(self) -> None:
        self._member.leave("told to by SIGTERM")
        self._serving.drain()

    async def _listen(self, messages: AsyncIterator[Message]) -> None:
        orders: dict[str, Callable[[Message], None]] = {
            "retire": lambda _: self._serving.retire(),
            "drain": lambda _: self._serving.drain(),
            "shed": self._shed,
            "ping": lambda _: self._channel.send("pong"),
        }
        async for message in messages:
            orders.get(message["kind"], self._member.heed)(message)
        logger.error("the supervisor is gone; draining")
        self._serving.drain()

    def _shed(self, message: Message) -> None:
        self._serving.http.closing = message["count"]


if __name__ == "__main__":
    sys.exit(main())
