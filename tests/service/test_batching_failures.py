"""The batcher when something breaks, and how it ends: only culprits fail, nobody waits for ever."""

import asyncio
import threading
from contextlib import suppress

import pytest
from batching_support import FakeModel, Journal, batcher_of, occupy, queue_up, submit
from support import until

from service.errors import InferenceFailed, NotReady


def test_only_the_culprit_fails_and_the_next_batch_is_good():
    model, journal = FakeModel(), Journal()
    model.poison = {2}

    async def scenario():
        async with batcher_of(model, journal) as batcher:
            busy = await occupy(batcher, model)
            waiting = await queue_up(batcher, [1, 2, 3])
            model.gate.set()
            await asyncio.gather(*busy)
            good, bad, also_good = await asyncio.gather(*waiting, return_exceptions=True)
            assert (good, also_good) == (2, 6)
            assert isinstance(bad, InferenceFailed)
            assert "poisoned" in str(bad.__cause__)
            assert await submit(batcher, 4) == 8

    asyncio.run(scenario())
    assert model.batches[1:] == [[1, 2, 3], [1], [2], [3], [4]]


class HoldsCompany(FakeModel):
    """Keeps each batch of several until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.let_go = threading.Event(), threading.Event()

    def run(self, items):
        if len(items) > 1:
            self.held.set()
            assert self.let_go.wait(30), "the test forgot to let the batch go"
        return super().run(items)


def test_one_whose_caller_left_is_not_run_again_after_its_batch_failed():
    model, journal = HoldsCompany(), Journal()
    model.poison = {1}

    async def scenario():
        async with batcher_of(model, journal) as batcher:
            busy = await occupy(batcher, model)
            culprit, stays, leaves = await queue_up(batcher, [1, 2, 3])
            model.gate.set()
            await until(model.held.is_set, "the batch runs")
            leaves.cancel()
            with suppress(asyncio.CancelledError):
                await leaves
            model.let_go.set()
            assert await asyncio.gather(*busy, stays) == [2000, 4]
            with pytest.raises(InferenceFailed):
                await culprit

    asyncio.run(scenario())
    assert model.batches[1:] == [[1, 2, 3], [1], [2]]
    assert journal.reasons == ["cancelled"]


def test_a_short_answer_is_never_dealt_out():
    model = FakeModel()
    model.short_from = 2

    async def scenario():
        async with batcher_of(model) as batcher:
            busy = await occupy(batcher, model)
            waiting = await queue_up(batcher, [1, 2, 3])
            model.gate.set()
            assert await asyncio.gather(*busy, *waiting) == [2000, 2, 4, 6]

    asyncio.run(scenario())
    assert model.batches[1:] == [[1, 2, 3], [1], [2], [3]]  # thrown away, and asked again one by one


def test_no_answer_at_all_is_a_failure():
    model = FakeModel()
    model.short_from = 1

    async def scenario():
        async with batcher_of(model) as batcher:
            with pytest.raises(InferenceFailed):
                await submit(batcher, 1)

    asyncio.run(scenario())


def test_leaving_answers_what_was_accepted_and_takes_nothing_new():
    model = FakeModel()

    async def scenario():
        batcher = batcher_of(model, max_batch_size=2)
        async with batcher:
            busy = await occupy(batcher, model)
            waiting = await queue_up(batcher, range(5))
            leaving = asyncio.create_task(batcher.__aexit__(None, None, None))
            await until(lambda: batcher._draining, "draining")
            with pytest.raises(NotReady), batcher.admit(1):
                pass
            model.gate.set()
            await leaving
            assert all(task.done() for task in batcher._tasks)
            assert await asyncio.gather(*busy, *waiting) == [2000, 0, 2, 4, 6, 8]

    asyncio.run(scenario())


async def loop_turns() -> None:
    """Give every task that could go on now the time to do so."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("lanes", [1, 3])
def test_leaving_waits_for_what_was_let_in_and_is_not_queued_yet(lanes):
    async def scenario():
        batcher = batcher_of(FakeModel(), lanes=lanes)
        async with batcher:
            with batcher.admit(2):
                leaving = asyncio.create_task(batcher.__aexit__(None, None, None))
                await loop_turns()
                assert await batcher.submit(1, deadline=batcher._clock() + 5) == 2
                await loop_turns()
                assert not leaving.done()
                assert await batcher.submit(2, deadline=batcher._clock() + 5) == 4
            await asyncio.wait_for(leaving, 10)

    asyncio.run(scenario())


def test_leaving_does_not_wait_for_what_was_let_in_and_then_given_up():
    async def scenario():
        batcher = batcher_of(FakeModel(), lanes=2)
        async with batcher:
            with batcher.admit(1):
                leaving = asyncio.create_task(batcher.__aexit__(None, None, None))
                await loop_turns()
                assert not leaving.done()
            await asyncio.wait_for(leaving, 10)

    asyncio.run(scenario())


def test_an_item_for_a_batcher_that_has_ended_is_refused_at_once():
    async def scenario():
        async with batcher_of(FakeModel()) as batcher:
            pass
        with pytest.raises(NotReady):
            await asyncio.wait_for(batcher.submit(1, deadline=batcher._clock() + 60), 5)

    asyncio.run(scenario())


class BrokenJournal(Journal):
    """Fails, as only a bug of ours would: not in the model but beside it."""

    def ran(self, size, queue_s, run_s):
        raise ZeroDivisionError("the observer broke")


def test_the_death_of_a_lane_is_reported_and_those_who_wait_are_told():
    model = FakeModel()
    deaths: list[BaseException] = []

    async def scenario():
        async with batcher_of(model, BrokenJournal(), on_death=deaths.append) as batcher:
            await occupy(batcher, model)
            waiting = await queue_up(batcher, [1, 2])
            model.gate.set()
            for outcome in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(outcome, InferenceFailed)
            assert isinstance(batcher.failure, ZeroDivisionError)
            with pytest.raises(NotReady), batcher.admit(1):
                pass
            with pytest.raises(NotReady):
                await batcher.submit(3, deadline=batcher._clock() + 60)  # let in before, queued after

    asyncio.run(asyncio.wait_for(scenario(), 20))
    assert [type(death) for death in deaths] == [ZeroDivisionError]


def test_the_death_of_a_lane_settles_the_batch_that_it_ran():
    async def scenario():
        async with batcher_of(FakeModel(), BrokenJournal()) as batcher:
            with pytest.raises(InferenceFailed):
                await submit(batcher, 1, within_s=5)  # not DeadlineExceeded: nobody works on it any more

    asyncio.run(scenario())
