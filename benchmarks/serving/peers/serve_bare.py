"""No server at all: the least that Python can do between a socket and the model, as a floor to measure others against.

uvloop and httptools, as foldserve has them, Pillow on the event loop, a thread for each run. It has no deadline, no
limit, no queue to speak of, no metric, no log, no id, no error but a closed connection.
"""

import asyncio
import json
import threading
from collections import deque
from typing import Any

import httptools
import numpy as np
import uvloop
from predicting import MAX_BATCH_SIZE, WORKERS, Predictor, decode, port

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


class Lanes:
    """Threads that each take their share of what waits."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[np.ndarray, Connection]] = deque()
        self._changed = threading.Condition()
        self._predictor = Predictor()
        for _ in range(WORKERS):
            threading.Thread(target=self._serve, daemon=True).start()

    def put(self, pixels: np.ndarray, connection: "Connection") -> None:
        """Queue an image for whoever sent it."""
        with self._changed:
            self._waiting.append((pixels, connection))
            self._changed.notify()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                share = min(MAX_BATCH_SIZE, -(-len(self._waiting) // WORKERS))
                batch = [self._waiting.popleft() for _ in range(share)]
            answers = self._predictor.predict([pixels for pixels, _ in batch])
            self._loop.call_soon_threadsafe(_answer, [one for _, one in batch], answers)


class Connection(asyncio.Protocol):
    """One caller, who sends an image and waits for its answer."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # TCP has no other
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, piece: bytes) -> None:
        self._body += piece

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        try:
            self._lanes.put(decode(body), self)
        except OSError:
            self._transport.close()

    def answer(self, document: dict[str, Any]) -> None:
        if not self._transport.is_closing():
            body = json.dumps(document).encode()
            self._transport.write(HEAD % len(body) + body)


def _answer(connections: list[Connection], documents: list[dict[str, Any]]) -> None:
    for connection, document in zip(connections, documents, strict=True):
        connection.answer(document)


async def main() -> None:
    """Serve until the process is ended."""
    lanes = Lanes()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(lanes), "127.0.0.1", port())
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
