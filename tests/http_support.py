"""What tests of connections share: the service behind our own HTTP server, on the test's event loop."""

import asyncio
import socket
from contextlib import asynccontextmanager

from support import Engines, until

from service.app import create_app
from service.config import Settings
from service.serving import HttpServer


@asynccontextmanager
async def listening(models, engines: Engines, on_closed=lambda: None, **options):
    """Yield an address and the service behind our own HTTP server; `on_closed` hears of each connection's end."""
    settings = Settings(models=models, **{"device": "cpu", "lanes": 1, "share_identical": False, **options})
    app = create_app(settings, open_engine=engines)
    server = HttpServer(app, settings, on_closed)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started and app.state.service.is_ready, "ready")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    accepting = asyncio.create_task(_accept(listener, server))
    try:
        yield listener.getsockname(), app.state.service
    finally:
        for engine in engines.opened:
            engine.gate.set()
        accepting.cancel()
        server.should_exit = True
        await task
        listener.close()


async def _accept(listener: socket.socket, server: HttpServer) -> None:
    while True:
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        connection.setblocking(False)
        server.take(connection)


def request_of(content: bytes, query: str = "") -> bytes:
    return f"POST /predict{query} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
