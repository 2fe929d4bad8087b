"""How many waiting images to run together, and in which certified shape: the cheapest by measured cost. Pure."""

import math
from collections.abc import Mapping

from service.engine import Shape

RUN_OVERHEAD_S = 0.0002  # what a run costs beside its kernels, in the queue, threads and futures; measured with mnist
WORTH_ALL_CORES = 0.8  # a lone image takes all cores where that needs at most this share of the time on one
WORTH_WAITING = 0.015  # a larger batch has to answer so much more images a second: all in it wait for the last
SHORT_RUN_S = 0.005  # the next run after a longer one is not made up before it ends: no urgent image could go first
TAIL = 4  # beyond so many of the largest batches, how the tail is cut decides nothing about the first run


class Planner:
    """Plans runs from what each certified shape costs, in seconds.

    The shapes of fewest threads serve a crowd, one lane each; all shapes stand open to an image that is alone.
    Raises ValueError without any shape.
    """

    def __init__(self, costs_s: Mapping[Shape, float]) -> None:
        if not costs_s:
            raise ValueError("a planner needs at least one shape")
        self._costs_s = {shape: cost + RUN_OVERHEAD_S for shape, cost in costs_s.items()}
        fewest = min(shape.threads for shape in self._costs_s)
        self._crowd = _worth_waiting({one: cost for one, cost in self._costs_s.items() if one.threads == fewest})
        self.largest = max(shape.batch_size for shape in self._crowd)
        is_short = max(self._crowd.values()) <= SHORT_RUN_S
        self.enough = -(-self.largest // 2) if is_short else None  # for a busy lane to take them as its next run
        # Worked out beforehand: a search at each run would cost a small model a tenth of its time.
        self._firsts = self._first_runs()
        self._shapes = [_cheapest(self._crowd, max(1, count)) for count in range(self.largest + 1)]
        self._lone = self._shape_for_one()

    def take(self, waiting: int, idle_lanes: int) -> int:
        """Return how many of the waiting images one of the idle lanes runs next; `idle_lanes` counts it."""
        return self._firsts[min(math.ceil(waiting / idle_lanes), TAIL * self.largest)]

    def shape(self, count: int, *, alone: bool) -> Shape:
        """Return the cheapest shape that holds `count` images; `alone`: no other run is under way."""
        return self._lone if alone and count == 1 else self._shapes[count]

    def _shape_for_one(self) -> Shape:
        wide = _cheapest(self._costs_s, 1)
        pays = self._costs_s[wide] <= WORTH_ALL_CORES * self._costs_s[self._shapes[1]]
        return wide if pays else self._shapes[1]

    def _first_runs(self) -> list[int]:
        """Return for each number of images how many the first run takes where all runs together take the least time."""
        seconds, firsts = [0.0], [0]
        for count in range(1, TAIL * self.largest + 1):
            options = (
                (cost + seconds[max(0, count - shape.batch_size)], -min(count, shape.batch_size))
                for shape, cost in self._crowd.items()
            )
            best, taken = min(options)
            seconds.append(best)
            firsts.append(-taken)
        return firsts


def _worth_waiting(costs_s: Mapping[Shape, float]) -> dict[Shape, float]:
    """Return the shapes up to the smallest that answers nearly as many images a second as the best."""
    each_s = {shape: cost / shape.batch_size for shape, cost in costs_s.items()}
    good = (shape.batch_size for shape, cost in each_s.items() if cost <= (1 + WORTH_WAITING) * min(each_s.values()))
    largest = min(good)
    return {shape: cost for shape, cost in costs_s.items() if shape.batch_size <= largest}


def _cheapest(costs_s: Mapping[Shape, float], count: int) -> Shape:
    return min((shape for shape in costs_s if shape.batch_size >= count), key=lambda shape: (costs_s[shape], shape))
