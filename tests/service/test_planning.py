"""The planner's runs cost what the cheapest plan costs, by brute force."""

from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine import Shape
from service.planning import RUN_OVERHEAD_S, SHORT_RUN_S, WORTH_ALL_CORES, WORTH_WAITING, Planner

COSTS = st.dictionaries(st.integers(1, 8), st.integers(1, 50), min_size=1, max_size=4)


def crowd(costs: dict[int, int]) -> dict[Shape, float]:
    return {Shape(size, 1): float(cost) for size, cost in costs.items()}


def cheapest(costs: dict[int, int], count: int) -> int:
    """Return the least cost of any set of runs that holds `count` images."""
    plans = (plan for runs in range(1, count + 1) for plan in combinations_with_replacement(costs, runs))
    return min(sum(costs[size] for size in plan) for plan in plans if sum(plan) >= count)


@settings(deadline=None, max_examples=150)
@given(COSTS, st.integers(1, 12))
def test_repeated_taking_costs_what_the_cheapest_plan_costs(costs, waiting):
    planner, spent, left = Planner(crowd(costs)), 0.0, waiting
    while left:
        taken = planner.take(left, 1)
        shape = planner.shape(taken, alone=False)
        spent, left = spent + costs[shape.batch_size], left - taken

    whole = cheapest({size: cost for size, cost in costs.items() if size <= planner.largest}, waiting)
    assert spent == whole if waiting <= 4 * planner.largest else spent >= whole


@given(COSTS, st.integers(1, 500), st.integers(1, 64))
def test_it_takes_at_least_one_and_never_more_than_waits_or_fits(costs, waiting, lanes):
    planner = Planner(crowd(costs))

    taken = planner.take(waiting, lanes)

    assert 1 <= taken <= min(waiting, planner.largest) <= max(costs)
    assert planner.shape(taken, alone=False).batch_size >= taken


@given(COSTS, st.integers(1, 8))
def test_idle_lanes_share_what_waits(costs, lanes):
    planner = Planner(crowd(costs))

    assert planner.take(lanes, lanes) == 1


@given(st.dictionaries(st.builds(Shape, st.integers(1, 8), st.sampled_from([1, 4])), st.integers(1, 50), min_size=1))
def test_a_lone_image_gets_all_cores_where_that_clearly_pays_and_company_only_the_fewest_threads(costs):
    planner = Planner({shape: float(cost) for shape, cost in costs.items()})
    fewest = min(shape.threads for shape in costs)

    shared = min(cost for shape, cost in costs.items() if shape.threads == min(one.threads for one in costs))
    clearly = WORTH_ALL_CORES * (shared + RUN_OVERHEAD_S)
    best = min(costs.values())
    assert costs[planner.shape(1, alone=True)] == (best if best + RUN_OVERHEAD_S <= clearly else shared)
    beside = planner.shape(1, alone=False)
    assert beside.threads == fewest
    assert costs[beside] == min(cost for shape, cost in costs.items() if shape.threads == fewest)


def test_a_batch_is_padded_where_that_is_cheaper_than_two_runs():
    planner = Planner(crowd({1: 10, 2: 12, 4: 15}))

    assert planner.take(3, 1) == 3
    assert planner.shape(3, alone=False) == Shape(4, 1)


def test_where_batching_gains_nothing_images_run_one_by_one():
    assert Planner(crowd({1: 1, 8: 9})).take(8, 1) == 1


def test_a_batch_that_gains_nearly_nothing_is_not_formed_for_all_in_it_wait_for_the_last():
    resnet18 = {1: 9.83e-3, 2: 19.11e-3, 4: 37.63e-3, 8: 75.02e-3}  # integers, on one core of an EPYC
    planner = Planner({Shape(size, 1): cost for size, cost in resnet18.items()})

    assert [planner.take(waiting, 1) for waiting in (1, 2, 8, 16)] == [1, 2, 4, 4]
    assert planner.shape(1, alone=False) == Shape(1, 1)


@given(COSTS)
def test_what_is_given_up_for_shorter_waits_is_a_small_share_of_the_rate(costs):
    planner = Planner(crowd(costs))

    each = {size: (cost + RUN_OVERHEAD_S) / size for size, cost in costs.items()}
    kept = min(cost for size, cost in each.items() if size <= planner.largest)
    assert kept <= (1 + WORTH_WAITING) * min(each.values())
    assert all(cost > (1 + WORTH_WAITING) * min(each.values()) for size, cost in each.items() if size < planner.largest)


def test_a_planner_without_shapes_is_refused():
    with pytest.raises(ValueError, match="at least one shape"):
        Planner({})


@pytest.mark.parametrize("largest", [64, 128, 512])
def test_large_batches_and_long_queues_are_planned(largest):
    planner = Planner({Shape(2**power, 1): 100.0 + 2**power for power in range(largest.bit_length())})

    assert planner.take(4 * largest, 1) == largest


@pytest.mark.parametrize(
    ("each_s", "enough"), [(0.0001, 4), ((SHORT_RUN_S - RUN_OVERHEAD_S) / 8, 4), (0.001, None), (0.03, None)]
)
def test_only_where_runs_are_short_a_busy_lane_takes_the_next_one(each_s, enough):
    planner = Planner({Shape(8, 1): 8 * each_s})

    assert planner.enough == enough
