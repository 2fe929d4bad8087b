"""What a lane's thread does with a batch: it runs what is wanted of it still. Knows no event loop and no queue."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic

from service.errors import InferenceFailed
from service.queueing import Item, Pending, Result
from service.threads import Threads

NICENESS = 5  # a third of the event loop's weight, which else waits for a core behind the runs that wait for it


@dataclass(slots=True, eq=False)
class Ran(Generic[Item, Result]):
    """What was run of a batch, and what came out; `started` is a time of the batcher's clock, in seconds."""

    started: float
    ran: list[Pending[Item, Result]]
    results: Sequence[Result]


def lane_threads(
    count: int, run_batch: Callable[[Sequence[Item]], Sequence[Result]], clock: Callable[[], float]
) -> Threads[list[Pending[Item, Result]], Ran[Item, Result]]:
    """Return `count` threads that run batches. InferenceFailed where `run_batch` gives too few results, or too many."""
    return Threads(count, "lane", partial(_run_wanted, run_batch, clock), NICENESS)


def _run_wanted(
    run_batch: Callable[[Sequence[Item]], Sequence[Result]],
    clock: Callable[[], float],
    batch: list[Pending[Item, Result]],
) -> Ran[Item, Result]:
    started = clock()
    wanted = [one for one in batch if one.is_wanted]  # it may have been at hand for a while, its callers gone
    results = run_batch([one.item for one in wanted]) if wanted else ()
    if len(results) != len(wanted):
        raise InferenceFailed(f"the engine gave {len(results)} answers for {len(wanted)} images")
    return Ran(started, wanted, results)
