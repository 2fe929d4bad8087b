"""Room for request bodies, in bytes, all together. Knows no HTTP."""

from typing import Self

from service.errors import QueueFull


class Room:
    """So many bytes of request bodies may be in hand at once."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    def hold(self, expected_bytes: int) -> "Held":
        """Return a context that holds room for a request body until it is answered."""
        return Held(self, expected_bytes)


class Held:
    """Room for one body while the context is open. Entering raises QueueFull when the bodies in hand are too many."""

    __slots__ = ("_bytes", "_room")

    def __init__(self, room: Room, expected_bytes: int) -> None:
        self._room = room
        self._bytes = expected_bytes

    def __enter__(self) -> Self:
        if self._room.held_bytes + self._bytes > self._room.limit_bytes:
            raise QueueFull("the request bodies in hand are too many bytes", retry_after_s=1)
        self._room.held_bytes += self._bytes
        return self

    def __exit__(self, *_: object) -> None:
        self._room.held_bytes -= self._bytes

    def correct(self, actual_bytes: int) -> None:
        """Hold what the body has turned out to be, in bytes."""
        self._room.held_bytes += actual_bytes - self._bytes
        self._bytes = actual_bytes
