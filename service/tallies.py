"""Observations of a histogram that are counted together: one by one each takes 0.8 µs, and a request makes seven.

What is held counts once it is handed over: when somebody reads the metrics, and after every few hundred observations.
A process that is killed takes what it held along; counters do not come this way.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from math import fsum
from typing import Any


class Tally:
    """Stands before one series of a histogram; safe to use from several threads."""

    def __init__(self, series: Any) -> None:
        self._series = series
        self._held: deque[float] = deque()
        self.observe: Callable[[float], None] = self._held.append

    def hand_over(self) -> None:
        """Count what is held."""
        amounts = []
        try:
            while True:
                amounts.append(self._held.popleft())
        except IndexError:  # all of them, or another thread took the rest
            pass
        if amounts:
            add_all(self._series, amounts)


def add_all(series: Any, amounts: list[float]) -> None:
    """Do what `series.observe` does with each of the amounts, and sort them; the library has no call for several."""
    amounts.sort()
    below = 0
    bounds = series._upper_bounds  # noqa: SLF001 - no public way to them, here and below; a test compares with `observe`
    for bucket, bound in zip(series._buckets, bounds, strict=True):  # noqa: SLF001
        upto = bisect_right(amounts, bound)
        if upto > below:
            bucket.inc(upto - below)
        below = upto
    series._sum.inc(fsum(amounts))  # noqa: SLF001
