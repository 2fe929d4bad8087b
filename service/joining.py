"""A transport that sends what is written in one turn of the event loop in one piece.

uvicorn writes an answer's head and body apart. A process that is killed between the two has sent half an answer, and no
balancer can take a head back to ask elsewhere.
"""

import asyncio
from typing import Any


class JoinedWrites:
    """Stands for a transport, and is one in all but writing."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, piece: bytes) -> None:
        """Send this with all else that is written before the loop turns."""
        if not self._held:
            self._loop.call_soon(self._send)
        self._held.append(piece)

    def write_at_once(self, piece: bytes) -> None:
        """Send this, behind what is held."""
        if self._held:
            self.write(piece)
        elif not self._transport.is_closing():
            self._transport.write(piece)

    def write_eof(self) -> None:
        """Send what is held, then end this direction."""
        self._send()
        self._transport.write_eof()

    def close(self) -> None:
        """Send what is held, then close, whatever becomes of the sending."""
        try:
            self._send()
        finally:
            self._transport.close()

    def _send(self) -> None:
        held, self._held = self._held, []
        if held and not self._transport.is_closing():
            self._transport.write(b"".join(held))
