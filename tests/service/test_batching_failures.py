"""The batcher when something breaks, and how it ends: only culprits fail, nobody waits for ever."""

import asyncio

import pytest
from support import FakeModel, Journal, batcher_of, occupy, queue_up, submit, until

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

    asyncio.run(asyncio.wait_for(scenario(), 20))
    assert [type(death) for death in deaths] == [ZeroDivisionError]


def test_the_death_of_a_lane_settles_the_batch_that_it_ran():
    async def scenario():
        async with batcher_of(FakeModel(), BrokenJournal()) as batcher:
            with pytest.raises(InferenceFailed):
                await submit(batcher, 1, within_s=5)  # not DeadlineExceeded: nobody works on it any more

    asyncio.run(scenario())
