"""What a probe would cost is counted whole, and what it leaves out is said."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from independence_support import FaultyEngine
from support import random_pixels

from service.engine import Shape
from service.independence.effort import FULL, QUICK, affordable, divide, seconds
from service.independence.probe import probe

SIZES = st.sets(st.integers(1, 16), min_size=1, max_size=5)
COSTS = SIZES.flatmap(lambda sizes: st.fixed_dictionaries({Shape(size, 1): st.floats(1e-5, 1.0) for size in sizes}))


@given(COSTS, st.integers(1, 8))
def test_every_shape_is_in_one_lane_and_the_caller_always_has_one(costs, lanes):
    shares = divide(list(costs), costs, FULL, lanes)

    assert sorted(shape for share in shares for shape in share) == sorted(costs)
    assert len(shares) == lanes
    assert shares[0]


@given(COSTS, st.integers(1, 8), st.floats(0, 200))
def test_what_is_left_fits_the_budget_or_is_the_least_there_is(costs, lanes, spent_s):
    effort, cut = affordable(costs, FULL, lanes, spent_s=spent_s)
    largest = max(shape.batch_size for shape in costs)

    assert spent_s + seconds(costs, effort, lanes) <= FULL.budget_s or (effort.images, effort.repeats) == (largest, 1)
    assert bool(cut) == (replace(effort, images=max(effort.images, FULL.images)) != FULL or effort.images < FULL.images)


@pytest.mark.parametrize("effort", [FULL, QUICK], ids=["full", "quick"])
def test_the_count_of_runs_is_the_one_that_is_made(effort):
    """At a second a run on one lane, seconds are runs; a run of four threads in the concurrent part counts as four."""
    shapes = (Shape(1, 1), Shape(2, 1), Shape(8, 1))
    engine, costs = FaultyEngine(), dict.fromkeys(shapes, 1.0)

    probe(engine.run, shapes, random_pixels(3), replace(effort, budget_s=1e9), costs_s=costs)

    assert len(engine.shapes) == seconds(costs, effort, lanes=1)


@pytest.mark.parametrize("spent_s, is_cut", [(0.0, False), (89.99, True)])
def test_time_that_is_gone_before_counts(spent_s, is_cut):
    assert bool(affordable({Shape(1, 1): 0.001}, FULL, spent_s=spent_s)[1]) is is_cut
