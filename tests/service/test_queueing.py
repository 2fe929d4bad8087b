"""Who goes first: the rule of the queue, and what becomes of those who leave it."""

import asyncio
from contextlib import suppress

import pytest
from batching_support import FakeModel, Journal, batcher_of, occupy, submit
from hypothesis import given
from hypothesis import strategies as st
from support import until

from service.errors import DeadlineExceeded, InferenceFailed
from service.queueing import OLDEST_EVERY, PRIORITIES, Pending, PriorityQueue


def queue_of(*priorities) -> PriorityQueue[int, int]:
    queue: PriorityQueue[int, int] = PriorityQueue()
    for index, priority in enumerate(priorities):
        queue.put(Pending(index, None, float(index), priority))
    return queue


def order_of(queue: PriorityQueue[int, int]) -> list[int]:
    return [queue.pop().item for _ in range(len(queue))]


def test_high_goes_before_normal_and_normal_before_low_and_the_first_first():
    assert order_of(queue_of("low", "normal", "high", "low", "normal", "high")) == [2, 5, 1, 4, 0, 3]


@pytest.mark.parametrize("crowd", ["high", "normal"])
def test_low_is_taken_every_eighth_time_however_many_of_higher_class_wait(crowd):
    queue = queue_of("low", "low", *[crowd] * 100)

    taken = [queue.pop().priority for _ in range(2 * OLDEST_EVERY)]

    assert [index for index, priority in enumerate(taken, 1) if priority == "low"] == [OLDEST_EVERY, 2 * OLDEST_EVERY]


def test_the_eighth_is_the_one_that_waited_longest_not_the_lowest():
    queue = queue_of("normal", "low", *["high"] * 20)

    assert [queue.pop().item for _ in range(OLDEST_EVERY)][-1] == 0


def test_an_empty_queue_has_nothing_to_take():
    with pytest.raises(IndexError):
        queue_of().pop()


@given(st.lists(st.tuples(st.sampled_from(PRIORITIES), st.booleans()), max_size=40))
def test_everything_that_was_not_taken_out_is_taken_once(arrivals):
    queue = queue_of(*(priority for priority, _ in arrivals))
    for pending, (_, leaves) in zip(sorted(queue, key=lambda one: one.item), arrivals, strict=True):
        if leaves:
            queue.remove(pending)
    stays = [index for index, (_, leaves) in enumerate(arrivals) if not leaves]

    assert len(queue) == len(stays)
    assert sorted(order_of(queue)) == stays
    assert not queue


def asking(batcher, *asked) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(submit(batcher, item, **options)) for item, options in asked]


def test_an_urgent_item_overtakes_those_who_wait():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model, max_batch_size=1) as batcher:
            busy = await occupy(batcher, model)
            waiting = asking(batcher, (1, {"priority": "low"}), (2, {}), (3, {"priority": "high"}))
            await until(lambda: batcher.depth == 3, "all wait")
            model.gate.set()
            await asyncio.gather(*busy, *waiting)

    asyncio.run(scenario())
    assert model.batches[1:] == [[3], [2], [1]]


def test_items_of_one_key_in_flight_run_once_and_answer_all_who_asked():
    model, journal = FakeModel(), Journal()

    async def scenario():
        async with batcher_of(model, journal) as batcher:
            busy = await occupy(batcher, model)
            waiting = asking(batcher, *[(7, {"key": "seven"})] * 3, (8, {"key": "eight"}), (7, {}))
            await until(lambda: batcher.admitted == 6, "all wait")
            assert batcher.depth == 3
            model.gate.set()
            assert await asyncio.gather(*busy, *waiting) == [2000, 14, 14, 14, 16, 14]
            assert await submit(batcher, 7, key="seven") == 14  # no longer in flight, so it runs

    asyncio.run(scenario())
    assert model.batches[1:] == [[7, 8, 7], [7]]
    assert journal.joined == 2


def test_one_that_runs_already_is_joined_as_well():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model) as batcher:
            model.gate.clear()
            first, *_ = asking(batcher, (7, {"key": "seven"}))
            await until(lambda: model.batches == [[7]], "it runs")
            second, *_ = asking(batcher, (7, {"key": "seven"}))
            await until(lambda: batcher.admitted == 2, "the second came")
            model.gate.set()
            assert await asyncio.gather(first, second) == [14, 14]

    asyncio.run(scenario())
    assert model.batches == [[7]]


@pytest.mark.parametrize("who", [0, 1, 2])
def test_one_of_those_who_share_may_leave_and_the_others_are_answered(who):
    model, journal = FakeModel(), Journal()

    async def scenario():
        async with batcher_of(model, journal) as batcher:
            busy = await occupy(batcher, model)
            waiting = asking(batcher, *[(7, {"key": "seven"})] * 3)
            await until(lambda: batcher.admitted == 4, "all wait")
            waiting[who].cancel()
            with suppress(asyncio.CancelledError):
                await waiting[who]
            model.gate.set()
            rest = [task for index, task in enumerate(waiting) if index != who]
            assert await asyncio.gather(*busy, *rest) == [2000, 14, 14]

    asyncio.run(scenario())
    assert model.batches[1:] == [[7]]
    assert journal.reasons == ["cancelled"]


def test_each_of_those_who_share_has_a_deadline_of_his_own():
    model, journal = FakeModel(), Journal()

    async def scenario():
        async with batcher_of(model, journal) as batcher:
            busy = await occupy(batcher, model)
            late, patient = asking(batcher, (7, {"key": "seven", "within_s": 0.05}), (7, {"key": "seven"}))
            with pytest.raises(DeadlineExceeded):
                await late
            model.gate.set()
            assert await asyncio.gather(*busy, patient) == [2000, 14]

    asyncio.run(scenario())
    assert journal.reasons == ["deadline"]


def test_when_all_who_share_have_left_there_is_no_run_and_the_next_starts_anew():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model) as batcher:
            busy = await occupy(batcher, model)
            gone = asking(batcher, *[(7, {"key": "seven"})] * 2)
            await until(lambda: batcher.admitted == 3, "both wait")
            for task in gone:
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
            assert batcher.depth == 0
            (later,) = asking(batcher, (9, {"key": "seven"}))
            await until(lambda: batcher.depth == 1, "a new one waits")
            model.gate.set()
            assert await asyncio.gather(*busy, later) == [2000, 18]

    asyncio.run(scenario())
    assert model.batches[1:] == [[9]]


def test_the_most_urgent_of_those_who_share_decides_the_place():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model, max_batch_size=1) as batcher:
            busy = await occupy(batcher, model)
            asked = [(7, {"key": "seven", "priority": "low"}), (8, {}), (7, {"key": "seven", "priority": "high"})]
            waiting = asking(batcher, *asked)
            await until(lambda: batcher.admitted == 4, "all wait")
            model.gate.set()
            await asyncio.gather(*busy, *waiting)

    asyncio.run(scenario())
    assert model.batches[1:] == [[7], [8]]


def test_those_who_share_a_failure_are_all_told_and_it_is_not_kept():
    model = FakeModel()
    model.poison = {7}

    async def scenario():
        async with batcher_of(model) as batcher:
            busy = await occupy(batcher, model)
            waiting = asking(batcher, *[(7, {"key": "seven"})] * 2, (8, {}))
            await until(lambda: batcher.admitted == 4, "all wait")
            model.gate.set()
            await asyncio.gather(*busy)
            bad, also_bad, good = await asyncio.gather(*waiting, return_exceptions=True)
            assert isinstance(bad, InferenceFailed)
            assert isinstance(also_bad, InferenceFailed)
            assert good == 16
            model.poison.clear()
            assert await submit(batcher, 7, key="seven") == 14

    asyncio.run(scenario())


def test_five_hundred_who_leave_cost_no_run_and_the_next_is_the_next():
    model, journal = FakeModel(), Journal()

    async def scenario():
        async with batcher_of(model, journal, max_queue_size=600) as batcher:
            busy = await occupy(batcher, model)
            gone = asking(batcher, *((item, {}) for item in range(512)))
            await until(lambda: batcher.depth == 512, "all wait")
            for task in gone:
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
            assert (batcher.depth, batcher.admitted) == (0, 1)
            (late,) = asking(batcher, (5000, {}))
            model.gate.set()
            assert await asyncio.gather(*busy, late) == [2000, 10000]

    asyncio.run(scenario())
    assert model.batches[1:] == [[5000]]
    assert journal.reasons == ["cancelled"] * 512
