"""A bar that shows how many of a known number are done, for a person at a terminal; elsewhere it writes nothing."""

import sys
from collections.abc import Callable
from typing import TextIO

WIDTH = 30  # characters


def progress_bar(total: int, stream: TextIO | None = None) -> Callable[[int], None]:
    """Return what draws `done` of `total` on a terminal, standard error by default, and clears it when all are done."""
    where = sys.stderr if stream is None else stream

    def draw(done: int) -> None:
        if where.isatty():
            bar = "█" * (WIDTH * done // max(total, 1))
            where.write(f"\r\033[K{bar:{WIDTH}} {done}/{total}" if done < total else "\r\033[K")
            where.flush()

    return draw
