"""Room for request bodies, in bytes, all together. Knows no HTTP."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import QueueFull


class Room:
    """So many bytes of request bodies may be in hand at once."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0

    @contextmanager
    def hold(self, expected_bytes: int) -> Iterator[Callable[[int], None]]:
        """Hold room for a request body until it is answered; yields what corrects the size once it is known, in bytes.

        Raises QueueFull when the bodies in hand are too many.
        """
        if self._held_bytes + expected_bytes > self._limit_bytes:
            raise QueueFull("the request bodies in hand are too many bytes", retry_after_s=1)
        held = expected_bytes
        self._held_bytes += held

        def correct(actual_bytes: int) -> None:
            nonlocal held
            self._held_bytes += actual_bytes - held
            held = actual_bytes

        try:
            yield correct
        finally:
            self._held_bytes -= held
