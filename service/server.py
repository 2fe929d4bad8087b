"""One process that listens, serves, and ends as it is told by signals."""

import asyncio
import logging
import os
import signal
import socket

import uvloop

from service.config import Settings
from service.crew import Alone
from service.listening import Acceptor, Room, connections_possible, listen
from service.problems import NO_ROOM
from service.serving import Serving

logger = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then end as `OneProcess` does.

    Raises AddressUnavailable when the address cannot be had, and whatever ended the service for good.
    """
    listener = listen(settings)
    host, port = listener.getsockname()[:2]
    logger.info("listening on http://%s:%d (API at /docs); loading %s", host, port, settings.models)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, listener))
    logger.info("drained and stopped")


async def _serve(settings: Settings, listener: socket.socket) -> None:
    await OneProcess(settings, listener).run()


class OneProcess:
    """A service with a listener of its own.

    SIGTERM: not ready at once; what still arrives within the grace is answered; then what is in hand is, up to the
    limit. SIGINT comes from a person, not from a load balancer, and has no grace. A second signal ends it at once.
    """

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings = settings
        self._most = connections_possible(settings.max_connections)
        self._serving = Serving(settings, Alone(), self._closed)
        self._acceptor = Acceptor(listener, self._room, self._serving.http.take, NO_ROOM)

    async def run(self) -> None:
        """Serve to the end. Raises what ended the service for good."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._end, number)
        try:
            await self._serving.run(self._acceptor.open)
        finally:
            self._acceptor.close()

    def _room(self) -> Room:
        return "room" if self._serving.http.connections < self._most else "full"

    def _closed(self) -> None:
        self._acceptor.resume()

    def _end(self, number: signal.Signals) -> None:
        if self._serving.http.is_retiring:
            end_at_once()
        self._serving.retire()
        grace_s = self._settings.grace_s if number == signal.SIGTERM else 0.0
        logger.info("%s: not ready any more; draining in %g s", number.name, grace_s)
        asyncio.get_running_loop().call_later(grace_s, self._drain)

    def _drain(self) -> None:
        self._acceptor.close()
        self._serving.drain()


def end_at_once() -> None:
    """End the process and leave unanswered what is in hand."""
    logger.warning("a second signal: ending at once")
    logging.shutdown()
    os._exit(1)
