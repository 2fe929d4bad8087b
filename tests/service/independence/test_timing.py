"""What a run costs: the least of runs in turn, and doubtful where threads had to wait for a core each time."""

import hashlib
import os
import threading
import time

import numpy as np
import pytest
from support import random_pixels

from service.engine import Shape
from service.independence.timing import AGAIN_S, CALM_SHARE, FEWEST, PATIENCE_ROUNDS, Cost, costs_of, waits_s

ONE, TWO = Shape(1, 1), Shape(1, 2)
REAL = random_pixels(3)


class Machine:
    """A clock that runs tell what they take, and a count of how long threads waited for cores; `busy` rounds first."""

    def __init__(self, costs: dict[Shape, float], busy: int = 0, *, counts: bool = True) -> None:
        self.now = self.waiting = 0.0
        self.runs: list[Shape] = []
        self._costs, self._busy, self._counts = costs, busy, counts

    def run(self, images: np.ndarray, threads: int) -> np.ndarray:
        shape = Shape(len(images), threads)
        self.runs.append(shape)
        lost = self._costs[shape] if self.runs.count(shape) <= self._busy + 1 and threads > 1 else 0.0  # 1 to warm up
        self.now += self._costs[shape] + lost
        self.waiting += lost
        return np.zeros((len(images), 1), np.float32)

    def measure(self, shapes: tuple[Shape, ...] = (ONE, TWO), *, is_again: bool = False) -> dict[Shape, Cost]:
        waits = (lambda: {"1": self.waiting}) if self._counts else dict
        return costs_of(self.run, shapes, REAL, is_again=is_again, waits=waits, clock=lambda: self.now)


def test_a_neighbour_who_comes_and_goes_changes_no_cost():
    machine = Machine({ONE: 0.034, TWO: 0.019}, busy=5)

    costs = machine.measure()

    assert {shape: round(cost.seconds, 9) for shape, cost in costs.items()} == {ONE: 0.034, TWO: 0.019}
    assert all(cost.is_calm for cost in costs.values())


def test_candidates_are_timed_in_turn_so_that_a_neighbour_meets_them_all():
    machine = Machine({ONE: 0.034, TWO: 0.019})
    machine.measure()

    assert machine.runs == [ONE, TWO] * (1 + FEWEST)  # the first of each warms up


def test_a_neighbour_who_stays_makes_a_cost_doubtful_and_is_not_waited_for_for_ever():
    machine = Machine({ONE: 0.034, TWO: 0.019}, busy=10**6)

    costs = machine.measure()

    assert costs[ONE].is_calm
    assert costs[TWO] == Cost(pytest.approx(0.038), is_calm=False)
    assert machine.runs.count(TWO) == 1 + PATIENCE_ROUNDS


def test_a_long_run_is_not_repeated_beyond_patience():
    machine = Machine({ONE: 1.0, TWO: 5.0}, busy=10**6)
    machine.measure()

    assert machine.runs.count(TWO) == 1 + FEWEST


def test_what_is_measured_again_is_given_up_after_a_second_and_run_once_at_least():
    short, long = Machine({ONE: 0.08, TWO: 0.08}, busy=10**6), Machine({ONE: 1.0, TWO: 5.0}, busy=10**6)

    assert not short.measure((TWO,), is_again=True)[TWO].is_calm
    assert short.now - 2 * 0.08 < AGAIN_S + 2 * 0.08  # but for the run that warms up, and the last one's end
    long.measure((TWO,), is_again=True)
    assert long.runs == [TWO, TWO]


def test_where_the_kernel_keeps_no_count_the_least_of_several_has_to_do():
    assert Machine({ONE: 0.034, TWO: 0.019}, busy=1, counts=False).measure()[TWO] == Cost(pytest.approx(0.019), True)


def test_a_short_wait_is_no_disturbance():
    machine = Machine({ONE: 1.0})

    def run(images, threads):
        machine.waiting += 0.9 * CALM_SHARE
        return machine.run(images, threads)

    assert costs_of(run, (ONE,), REAL, waits=lambda: {"1": machine.waiting}, clock=lambda: machine.now)[ONE].is_calm


def test_a_thread_that_ends_between_two_looks_hides_nobody_elses_wait():
    looks = iter([{"lane": 0.0, "ending": 9.0}, {"lane": 0.5}] * 100)
    ticks = iter(range(1000))

    costs = costs_of(lambda images, threads: images, (ONE,), REAL, waits=lambda: next(looks), clock=lambda: next(ticks))

    assert not costs[ONE].is_calm


def test_the_kernel_counts_what_more_threads_than_cores_wait():
    if not waits_s():
        pytest.skip("this kernel keeps no count of how long threads wait for a core")
    before, until, counted = sum(waits_s().values()), time.monotonic() + 0.5, []
    content = bytes(2**24)

    def spin() -> None:
        while time.monotonic() < until:
            hashlib.sha256(content)  # lets the interpreter's lock go, which would keep all but one from wanting a core
        all_have_spun.wait(60)

    count = 3 * len(os.sched_getaffinity(0))
    all_have_spun = threading.Barrier(count, action=lambda: counted.append(sum(waits_s().values())))  # all still live
    threads = [threading.Thread(target=spin) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted[0] - before > 0.1
