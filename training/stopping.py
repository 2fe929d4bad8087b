"""Ctrl-C and SIGTERM as a wish that a run may grant when it suits. Knows no run."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from training import distributed


@contextmanager
def asked_to_stop(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first Ctrl-C or SIGTERM; a second Ctrl-C ends at once.

    Of several processes each would stop after another step, so there, and outside the main thread, signals end at once.
    """
    if threading.current_thread() is not threading.main_thread() or distributed.world_size() > 1:
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(*_: object) -> None:
        stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
