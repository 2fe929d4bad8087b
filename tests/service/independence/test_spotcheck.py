"""A flipped bit of a live answer is found, a third run decides, and nobody ever waits for it."""

import threading

import numpy as np
import pytest
from independence_support import flip
from support import random_pixels

from service.independence.spotcheck import WAITING, SpotCheck

PIXELS = random_pixels(1)[0]
TRUTH = np.array([[1.0, 2.0, 3.0]], np.float32)
RIGHT, WRONG, OTHER = TRUTH[0], flip(TRUTH, 0, 1)[0], flip(TRUTH, 0, 2)[0]


def verdicts_of(live, *replays, share=1.0):
    """Offer one answer, while running it alone gives `replays` one after another; return verdicts and runs."""
    left, found = list(replays), []
    with SpotCheck(lambda _: left.pop(0), share, found.append) as check:
        check.offer(PIXELS, live)
    return found, len(replays) - len(left)


@pytest.mark.parametrize(
    ("live", "replays", "verdict"),
    [
        (RIGHT, [RIGHT], "agreed"),
        (WRONG, [RIGHT, RIGHT], "live answer wrong"),
        (RIGHT, [WRONG, RIGHT], "reference unstable"),
        (RIGHT, [WRONG, OTHER], "reference unstable"),
        (np.abs(np.float32([0])), [-np.float32([0]), -np.float32([0])], "live answer wrong"),
        (np.float32([np.nan]), [np.float32([np.nan])], "agreed"),
    ],
    ids=["agreed", "one bit", "reference", "three ways", "minus zero", "NaN"],
)
def test_a_flipped_bit_is_found_and_a_third_run_decides(live, replays, verdict):
    assert verdicts_of(live, *replays) == ([verdict], len(replays))


def test_a_mismatch_is_logged_with_what_is_needed_to_find_it_again(caplog):
    verdicts_of(WRONG, RIGHT, RIGHT)

    assert "live answer wrong" in caplog.text
    assert caplog.text.count("pixels") == 1


def test_a_share_of_nothing_runs_nothing():
    assert verdicts_of(WRONG, RIGHT, share=0.0) == ([], 0)


def test_about_the_asked_share_is_taken():
    seen = threading.Semaphore(0)
    taken = 0
    with SpotCheck(lambda _: RIGHT, 0.25, lambda _: seen.release()) as check:
        check._choose.seed(1)
        for _ in range(400):
            before = check._waiting.unfinished_tasks
            check.offer(PIXELS, RIGHT)
            if check._waiting.unfinished_tasks > before:
                taken += 1
                assert seen.acquire(timeout=10)  # so that the queue is never full

    assert 60 < taken < 140  # 4.6 standard deviations of 400 tries at a quarter


def test_an_offer_never_waits_and_what_is_too_much_is_let_go():
    gate, entered, found = threading.Event(), threading.Event(), []

    def replay(_):
        entered.set()
        assert gate.wait(30), "the test forgot to open the gate"
        return RIGHT

    with SpotCheck(replay, 1.0, found.append) as check:
        check.offer(PIXELS, RIGHT)
        assert entered.wait(10)
        for _ in range(10 * WAITING):
            check.offer(PIXELS, RIGHT)
        assert found == []
        gate.set()

    assert found == ["agreed"] * (1 + WAITING)


def test_a_check_that_fails_ends_no_other(caplog):
    outcomes = [ZeroDivisionError("the engine"), RIGHT]
    found = []

    def replay(_):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with SpotCheck(replay, 1.0, found.append) as check:
        check.offer(PIXELS, RIGHT)
        check.offer(PIXELS, RIGHT)

    assert found == ["agreed"]
    assert "a spot check failed" in caplog.text


def test_what_was_offered_is_checked_before_it_ends_and_on_another_thread():
    names, found = [], []

    def replay(_):
        names.append(threading.current_thread().name)
        return RIGHT

    with SpotCheck(replay, 1.0, found.append) as check:
        for _ in range(5):
            check.offer(PIXELS, RIGHT)

    assert found == ["agreed"] * 5
    assert set(names) == {"spot-check"}
