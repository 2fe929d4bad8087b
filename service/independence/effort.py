"""How much a probe tries, and what of it fits into its time. Pure arithmetic on what a run of each shape costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from service.engine import Shape

EVERY = 10**6  # more slots than a batch has
MOST_IMAGES = 256  # no failure among 256 independent images bounds a failing share of 5 % with 1 − 2·10⁻⁶
STEPS = 100  # the effort is cut in steps of 1 %


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is tried, in about `budget_s` seconds; images, targets, repeats and concurrent runs may be cut."""

    budget_s: float
    images: int
    slots: int  # at most so many of a shape's slots
    fills: int  # kinds of hostile neighbours
    targets: int  # images that meet them
    repeats: int
    concurrent_runs: int


FULL = Effort(budget_s=90.0, images=MOST_IMAGES, slots=EVERY, fills=5, targets=4, repeats=50, concurrent_runs=200)
# Each comparison repeats an image's run, so none is made for the sake of repetition alone.
QUICK = Effort(budget_s=4.0, images=8, slots=2, fills=1, targets=1, repeats=0, concurrent_runs=8)


def affordable(
    costs_s: Mapping[Shape, float], wish: Effort, lanes: int = 1, *, spent_s: float = 0.0
) -> tuple[Effort, tuple[str, ...]]:
    """Return the effort that fits into the budget, of which `spent_s` is gone, and what was cut, in words.

    All is cut by one share; never below one image in each slot of the largest batch.
    """
    largest = max(shape.batch_size for shape in costs_s)
    wish = replace(wish, images=max(largest, wish.images))
    shares = (1 - step / STEPS for step in range(STEPS))
    efforts = (_scaled(wish, share, largest) for share in shares)
    effort = next(
        (one for one in efforts if spent_s + seconds(costs_s, one, lanes) <= wish.budget_s), _scaled(wish, 0, largest)
    )
    counts = (
        ("images", effort.images, wish.images),
        ("repetitions", effort.repeats, wish.repeats),
        ("images among hostile neighbours", effort.targets, wish.targets),
        ("concurrent runs", effort.concurrent_runs, wish.concurrent_runs),
    )
    end = f"to end in about {wish.budget_s:g} s"
    return effort, tuple(f"{got} {what} instead of {wished}, {end}" for what, got, wished in counts if got < wished)


def seconds(costs_s: Mapping[Shape, float], effort: Effort, lanes: int) -> float:
    """Return how long a probe takes: what `lanes` do side by side, the shapes of several threads, concurrent runs."""
    crowd = [shape for shape in costs_s if shape.threads == 1]
    shares = divide(crowd, costs_s, effort, lanes)
    apart = sum(_seconds_of(shape, costs_s, effort) for shape in costs_s if shape.threads > 1)
    a_run = sum(cost * shape.threads for shape, cost in costs_s.items()) / len(costs_s)
    return max(map(sum, _times(shares, costs_s, effort))) + apart + effort.concurrent_runs * a_run / lanes


def divide(shapes: Sequence[Shape], costs_s: Mapping[Shape, float], effort: Effort, lanes: int) -> list[list[Shape]]:
    """Divide shapes among lanes, the longest first, each to the lane that is free the soonest."""
    shares: list[list[Shape]] = [[] for _ in range(lanes)]
    for shape in sorted(shapes, key=lambda one: (-_seconds_of(one, costs_s, effort), one)):
        times = [sum(times) for times in _times(shares, costs_s, effort)]
        shares[times.index(min(times))].append(shape)
    return shares


def edge_slots(shape: Shape, effort: Effort) -> list[int]:
    """Return the slots where kernels change their ways: the ends, their neighbours, the middle."""
    size = shape.batch_size
    return [slot for slot in dict.fromkeys((0, size - 1, size // 2, 1, size - 2)) if 0 <= slot < size][: effort.slots]


def slots_tried(shape: Shape, effort: Effort) -> list[int]:
    """Return by how many slots the images are turned on, 0 first."""
    count = min(shape.batch_size, effort.slots)
    return [int(slot) for slot in np.linspace(0, shape.batch_size, count, endpoint=False)]


def fill_levels(shape: Shape, effort: Effort) -> range:
    """Return how many images share a batch with filler."""
    return range(1, shape.batch_size)[:: max(1, shape.batch_size // effort.slots)]


def _times(shares: Sequence[Sequence[Shape]], costs_s: Mapping[Shape, float], effort: Effort) -> list[list[float]]:
    return [[_seconds_of(shape, costs_s, effort) for shape in share] for share in shares]


def _seconds_of(shape: Shape, costs_s: Mapping[Shape, float], effort: Effort) -> float:
    """Return how long one shape is held against itself."""
    passes = math.ceil(effort.images / shape.batch_size) * len(slots_tried(shape, effort))
    meetings = effort.targets * effort.fills * len(edge_slots(shape, effort)) if shape.batch_size > 1 else 0
    return costs_s[shape] * (passes + meetings + len(fill_levels(shape, effort)) + effort.repeats)


def _scaled(wish: Effort, share: float, largest: int) -> Effort:
    return replace(
        wish,
        images=wish.images if share == 1 else max(largest, int(wish.images * share) // largest * largest),
        targets=max(1, int(wish.targets * share)),
        repeats=min(wish.repeats, max(1, int(wish.repeats * share))),
        concurrent_runs=min(wish.concurrent_runs, max(2, int(wish.concurrent_runs * share))),
    )
