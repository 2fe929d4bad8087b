"""What a run of each shape costs, apart from what other people's work adds to it. Knows no model file.

The candidates are timed in turn, again and again, so that a neighbour meets them all, and each counts with its least
time. The kernel says how long threads of this process stood ready and got no core: a run without that is *calm*. Where
no calm run of a shape was to be had its cost is doubtful, and is to be measured again when there is a chance.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.engine import Shape

Waits = Mapping[str, float]
Run = Callable[[NDArray[np.uint8], int], NDArray[np.float32]]  # images (batch_size, …) and threads → logits

FEWEST, MOST = 3, 9  # runs of each shape; the more the shorter they are
LONG_S = 0.05  # a shape that has taken so long has been timed often enough
PATIENCE_ROUNDS = 12  # after so many it is no passing disturbance
PATIENCE_S = 3.0  # nor after so long
AGAIN_S = 1.0  # and so long where there is a measurement already: a host that is never calm pays this at each start
CALM_SHARE = 0.05  # of a run's time, spent waiting for cores by all threads together: below what a plan hangs on


@dataclass(frozen=True, slots=True)
class Cost:
    """The least time of a run, seconds; `is_calm`: no thread of it had to wait for a core."""

    seconds: float
    is_calm: bool

    def better(self, other: "Cost | None") -> "Cost":
        """Return what both say: the lesser time, for what is above it is other people's; calm where one was."""
        return self if other is None else Cost(min(self.seconds, other.seconds), self.is_calm or other.is_calm)


def waits_s() -> Waits:
    """Return by thread of this process how long it has stood ready without a core, seconds; of none: nobody counts.

    Source: Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat, its second number, nanoseconds.
    """
    found = {}
    with suppress(OSError):  # no such folder
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError, IndexError, ValueError):  # it has ended meanwhile, or the kernel keeps no count
                found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    return found


def costs_of(
    run: Run,
    shapes: Sequence[Shape],
    real: NDArray[np.uint8],
    *,
    is_again: bool = False,
    waits: Callable[[], Waits] = waits_s,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Shape, Cost]:
    """Time shapes on `real` images, uint8 (n, height, width, channels): all in turn, until each has had calm runs.

    What is measured again, to be held against what there is, need be run but once, and is given up sooner.
    """
    fewest, patience_s = (1, AGAIN_S) if is_again else (FEWEST, PATIENCE_S)
    batches = {shape: np.resize(real, (shape.batch_size, *real.shape[1:])) for shape in shapes}
    for shape, batch in batches.items():
        run(batch, shape.threads)  # the first makes sessions and plans
    costs: dict[Shape, Cost] = {}
    spent_s = dict.fromkeys(shapes, 0.0)
    started, rounds = clock(), 0

    def needs_more(shape: Shape) -> bool:
        cost = costs.get(shape)
        if cost is None or rounds < fewest:
            return True
        if not cost.is_calm:
            return rounds < PATIENCE_ROUNDS and clock() - started < patience_s
        return rounds < MOST and spent_s[shape] < LONG_S

    while pending := [one for one in shapes if needs_more(one)]:
        for shape in pending:
            cost = _once(lambda: run(batches[shape], shape.threads), waits, clock)  # noqa: B023 - called at once
            spent_s[shape] += cost.seconds
            costs[shape] = cost.better(costs.get(shape))
        rounds += 1
    return costs


def _once(work: Callable[[], object], waits: Callable[[], Waits], clock: Callable[[], float]) -> Cost:
    before, started = waits(), clock()
    work()
    seconds, after = clock() - started, waits()
    waited_s = sum(waited - before.get(thread, 0.0) for thread, waited in after.items())
    return Cost(seconds, is_calm=waited_s <= CALM_SHARE * seconds)  # where nobody counts the least of several has to do
