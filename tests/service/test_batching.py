"""The batcher with a fake model: who runs with whom, who waits, who is dropped, who is refused."""

import asyncio
import itertools
from contextlib import ExitStack, suppress

import pytest
from batching_support import FakeModel, Journal, batcher_of, occupy, queue_up, submit
from support import until

from service.errors import DeadlineExceeded, QueueFull


def test_an_idle_batcher_answers_a_lone_item():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model) as batcher:
            assert await submit(batcher, 21) == 42

    asyncio.run(scenario())
    assert model.batches == [[21]]


def test_items_that_come_while_the_engine_is_busy_run_together_in_order():
    model, journal = FakeModel(), Journal()

    async def scenario():
        async with batcher_of(model, journal) as batcher:
            busy = await occupy(batcher, model)
            waiting = await queue_up(batcher, range(5))
            model.gate.set()
            assert await asyncio.gather(*busy, *waiting) == [2000, 0, 2, 4, 6, 8]

    asyncio.run(scenario())
    assert model.batches == [[1000], [0, 1, 2, 3, 4]]
    assert journal.sizes == [1, 5]


def test_an_idle_engine_never_waits_for_company():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model) as batcher:
            model.gate.clear()
            first = asyncio.create_task(submit(batcher, 1))
            await until(lambda: model.batches == [[1]], "the first runs though nothing else has come")
            model.gate.set()
            await first

    asyncio.run(scenario())


def test_with_a_delay_company_is_waited_for():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model, max_queue_delay_ms=300) as batcher:
            await asyncio.gather(*(submit(batcher, item) for item in range(3)))

    asyncio.run(scenario())
    assert model.batches == [[0, 1, 2]]


def test_no_batch_is_larger_than_the_limit():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model, max_batch_size=4) as batcher:
            busy = await occupy(batcher, model)
            waiting = await queue_up(batcher, range(10))
            model.gate.set()
            await asyncio.gather(*busy, *waiting)

    asyncio.run(scenario())
    assert model.batches[1:] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_idle_lanes_share_what_waits():
    model = FakeModel()
    model.gate.clear()

    async def scenario():
        async with batcher_of(model, lanes=2) as batcher:
            tasks = [asyncio.create_task(submit(batcher, item)) for item in range(6)]
            await until(lambda: len(model.batches) == 2, "both lanes run")
            assert sorted(len(batch) for batch in model.batches) == [3, 3]
            model.gate.set()
            await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_lanes_run_at_the_same_time():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model, lanes=3) as batcher:
            busy = await occupy(batcher, model, lanes=3)  # all three stand at the gate together
            model.gate.set()
            await asyncio.gather(*busy)

    asyncio.run(scenario())


def test_cancelled_caller_does_not_affect_its_neighbours():
    model, journal = FakeModel(), Journal()

    async def scenario():
        async with batcher_of(model, journal) as batcher:
            busy = await occupy(batcher, model)
            first, gone, last = await queue_up(batcher, [1, 2, 3])
            gone.cancel()
            with suppress(asyncio.CancelledError):
                await gone
            model.gate.set()
            assert await asyncio.gather(*busy, first, last) == [2000, 2, 6]
            assert batcher.admitted == 0

    asyncio.run(scenario())
    assert model.batches[1:] == [[1, 3]]  # its item did not cost a run
    assert journal.reasons == ["cancelled"]


def test_a_caller_that_leaves_during_the_run_does_not_affect_its_neighbours():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model) as batcher:
            busy = await occupy(batcher, model)
            stays, leaves = await queue_up(batcher, [1, 2])
            model.gate.set()
            await asyncio.gather(*busy)
            model.gate.clear()
            await until(lambda: len(model.batches) == 2, "the batch runs")
            leaves.cancel()
            model.gate.set()
            assert await stays == 2
            assert await submit(batcher, 5) == 10

    asyncio.run(scenario())


def test_an_item_whose_deadline_has_passed_is_dropped_before_it_costs_a_run():
    model, journal = FakeModel(), Journal()

    async def scenario():
        async with batcher_of(model, journal) as batcher:
            busy = await occupy(batcher, model)
            late = asyncio.create_task(submit(batcher, 1, within_s=0.05))
            patient = asyncio.create_task(submit(batcher, 2))
            with pytest.raises(DeadlineExceeded):
                await late
            await until(lambda: batcher.depth == 1, "only the other waits")
            model.gate.set()
            assert await asyncio.gather(*busy, patient) == [2000, 4]

    asyncio.run(scenario())
    assert model.batches[1:] == [[2]]
    assert journal.reasons == ["deadline"]


def test_a_caller_who_leaves_as_his_deadline_passes_is_counted_once():
    model = FakeModel()
    callers = []

    class Leaving(Journal):
        def dropped(self, reason):
            super().dropped(reason)
            callers[0].cancel()

    journal = Leaving()

    async def scenario():
        async with batcher_of(model, journal) as batcher:
            busy = await occupy(batcher, model)
            for within_s in (0.05, 60):  # they share the item, so that it stays in the queue
                work = batcher.submit(1, deadline=batcher._clock() + within_s, key="one")
                callers.append(asyncio.create_task(work))
            await asyncio.wait(callers[:1])
            model.gate.set()
            assert await asyncio.gather(*busy, callers[1]) == [2000, 2]

    asyncio.run(scenario())
    assert journal.reasons == ["deadline"]


def test_a_deadline_that_passes_during_the_run_ends_the_wait():
    model = FakeModel()
    model.gate.clear()

    async def scenario():
        async with batcher_of(model) as batcher:
            with pytest.raises(DeadlineExceeded):
                await submit(batcher, 1, within_s=0.05)
            model.gate.set()
            assert await submit(batcher, 2) == 4

    asyncio.run(scenario())


def test_a_full_queue_answers_at_once():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model, max_queue_size=3) as batcher:
            busy = await occupy(batcher, model)
            waiting = await queue_up(batcher, [1, 2])
            with pytest.raises(QueueFull, match="3 images are waiting, the limit is 3"), batcher.admit(1):
                pass
            model.gate.set()  # only now: the refusal did not wait for anything
            await asyncio.gather(*busy, *waiting)
            assert await submit(batcher, 3) == 6

    asyncio.run(scenario())


def test_admission_counts_images_and_gives_them_back_after_a_failure():
    async def scenario():
        async with batcher_of(FakeModel(), max_queue_size=4) as batcher:
            with suppress(ZeroDivisionError), batcher.admit(3):
                assert batcher.admitted == 3
                with pytest.raises(QueueFull), batcher.admit(2):
                    pass
                assert 1 / 0
            assert batcher.admitted == 0

    asyncio.run(scenario())


def test_retry_after_is_the_backlog_at_the_measured_rate():
    ticks = itertools.count()  # every look at this clock is a second later: a run of one item takes one second

    async def scenario():
        async with batcher_of(FakeModel(), clock=lambda: float(next(ticks)), lanes=1) as batcher:
            with batcher.admit(1):
                await batcher.submit(1, deadline=1e6)
            learned = batcher.admission.pace_s
            assert learned > 0
            with ExitStack() as stack:
                stack.enter_context(batcher.admit(13))
                assert batcher.admission.retry_after_s() == -(-13 * learned // 1)
                stack.enter_context(batcher.admit(51))
                with pytest.raises(QueueFull) as full, batcher.admit(1):
                    pass
            assert full.value.retry_after_s == 60  # never more than a minute
            assert batcher.admission.retry_after_s() == 1  # never less than a second

    asyncio.run(scenario())


async def told(hearing: list) -> None:
    await until(lambda: hearing, "he is told")


def test_a_caller_without_a_task_is_told_once_of_his_result():
    async def scenario():
        hearing = []
        async with batcher_of(FakeModel()) as batcher:
            with batcher.admit(1):
                waiter = batcher.begin(21, hearing.append, deadline=batcher._clock() + 60)
                assert waiter.is_waiting
                await told(hearing)
            waiter.leave()
        return hearing, waiter.is_waiting, waiter.has_left

    assert asyncio.run(scenario()) == ([42], False, False)


def test_a_caller_without_a_task_is_told_of_his_deadline_and_then_of_nothing():
    model, journal = FakeModel(), Journal()

    async def scenario():
        hearing = []
        async with batcher_of(model, journal) as batcher:
            busy = await occupy(batcher, model)
            with batcher.admit(1):
                batcher.begin(21, hearing.append, deadline=batcher._clock() + 0.02)
                await told(hearing)
            model.gate.set()
            await asyncio.gather(*busy)
        return hearing

    hearing = asyncio.run(scenario())

    assert [type(one) for one in hearing] == [DeadlineExceeded]
    assert (model.batches, journal.reasons) == ([[1000]], ["deadline"])


def test_a_caller_without_a_task_who_leaves_is_told_nothing_and_not_run():
    model, journal = FakeModel(), Journal()

    async def scenario():
        hearing = []
        async with batcher_of(model, journal) as batcher:
            busy = await occupy(batcher, model)
            with batcher.admit(2):
                waiter = batcher.begin(21, hearing.append, deadline=batcher._clock() + 60)
                waiter.leave()
                waiter.leave()
                model.gate.set()
                await asyncio.gather(*busy)
                assert await batcher.submit(1, deadline=batcher._clock() + 60) == 2
        return hearing, waiter.has_left

    assert asyncio.run(scenario()) == ([], True)
    assert (model.batches, journal.reasons) == ([[1000], [1]], ["cancelled"])


def test_callers_with_and_without_a_task_share_a_run_each_with_a_deadline_of_his_own():
    model = FakeModel()

    async def scenario():
        soon, late = [], []
        async with batcher_of(model) as batcher:
            busy = await occupy(batcher, model)
            with batcher.admit(3):
                batcher.begin(21, soon.append, deadline=batcher._clock() + 0.02, key="one")
                batcher.begin(21, late.append, deadline=batcher._clock() + 60, key="one")
                waiting = asyncio.create_task(batcher.submit(21, deadline=batcher._clock() + 60, key="one"))
                await told(soon)
                model.gate.set()
                await asyncio.gather(*busy)
                return [type(one) for one in soon], late, await waiting

    assert asyncio.run(scenario()) == ([DeadlineExceeded], [42], 42)
    assert model.batches == [[1000], [21]]
