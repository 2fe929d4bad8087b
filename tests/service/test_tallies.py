"""What is counted together is what would have been counted one by one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from service.metrics import SECONDS
from service.tallies import Tally

AMOUNTS = st.floats(0, 20) | st.sampled_from(SECONDS)  # a bound belongs to the bucket below it


def histogram() -> tuple[CollectorRegistry, Histogram]:
    registry = CollectorRegistry()
    return registry, Histogram("amounts", "some", ["kind"], buckets=SECONDS, registry=registry).labels("one")


def samples(registry: CollectorRegistry) -> dict:
    found = {(one.name, one.labels.get("le")): one.value for family in registry.collect() for one in family.samples}
    return {key: value for key, value in found.items() if not key[0].endswith("_created")}


@given(st.lists(st.lists(AMOUNTS)))
def test_a_tally_counts_what_the_library_would_have_counted_one_by_one(pieces):
    (by_tally, told), (one_by_one, series) = histogram(), histogram()
    tally = Tally(told)
    for piece in pieces:
        for amount in piece:
            tally.observe(amount)
            series.observe(amount)
        tally.hand_over()

    ours, theirs = samples(by_tally), samples(one_by_one)
    total = ("amounts_sum", None)
    assert ours.pop(total) == pytest.approx(theirs.pop(total), rel=1e-12)  # it is summed in another order
    assert ours == theirs


def test_nothing_is_lost_or_counted_twice_where_many_threads_observe_and_hand_over():
    registry, told = histogram()
    tally = Tally(told)

    def work(_: int) -> None:
        for _ in range(500):
            tally.observe(0.003)
            tally.hand_over()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    tally.hand_over()

    assert samples(registry)["amounts_count", None] == 4000
