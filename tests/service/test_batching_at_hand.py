"""Where runs are short, a busy lane has its next batch at hand: when it forms, and what of it is run."""

import asyncio
import threading

from batching_support import FakeModel, Journal, batcher_of, occupy, submit
from support import until


def coming(batcher, items):
    return [asyncio.create_task(submit(batcher, item)) for item in items]


async def leave(*tasks):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_a_full_batch_is_made_up_while_the_lane_is_busy_and_one_at_a_time():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model, enough=3, max_batch_size=3) as batcher:
            busy = await occupy(batcher, model)
            waiting = coming(batcher, range(7))
            await until(lambda: batcher.lanes.at_hand == 3, "three are at hand, and four are not")
            assert batcher.depth == 7, "they wait all the same"
            model.gate.set()
            await asyncio.gather(*busy, *waiting)

    asyncio.run(scenario())
    assert model.batches == [[1000], [0, 1, 2], [3, 4, 5], [6]]


def test_less_than_a_full_batch_waits_for_a_lane():
    model = FakeModel()

    async def scenario():
        async with batcher_of(model, enough=3, max_batch_size=3) as batcher:
            busy = await occupy(batcher, model)
            first = coming(batcher, range(2))
            await until(lambda: batcher.depth == 2, "both wait")
            assert batcher.lanes.at_hand == 0
            model.gate.set()
            await asyncio.gather(*busy, *first)

    asyncio.run(scenario())
    assert model.batches == [[1000], [0, 1]]


def test_idle_lanes_share_what_waits_though_they_may_have_batches_at_hand():
    model = FakeModel()
    model.gate.clear()

    async def scenario():
        async with batcher_of(model, enough=8, lanes=2) as batcher:
            tasks = coming(batcher, range(6))
            await until(lambda: len(model.batches) == 2, "both lanes run")
            assert sorted(len(batch) for batch in model.batches) == [3, 3]
            model.gate.set()
            await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_what_nobody_waits_for_any_more_is_not_run_though_it_is_at_hand():
    model, journal = FakeModel(), Journal()

    async def scenario():
        async with batcher_of(model, journal, enough=2, max_batch_size=2) as batcher:
            busy = await occupy(batcher, model)
            stays, gone, *both_gone = coming(batcher, range(4))
            await until(lambda: (batcher.lanes.at_hand, batcher.depth) == (2, 4), "two are at hand, two wait")
            await leave(gone, *both_gone)
            late = coming(batcher, [8, 9])
            model.gate.set()
            assert await asyncio.gather(*busy, stays, *late) == [2000, 0, 16, 18]

    asyncio.run(scenario())
    assert model.batches == [[1000], [0], [8, 9]]
    assert journal.reasons == ["cancelled"] * 3
    assert journal.sizes == [1, 1, 2]


def test_a_batch_at_hand_that_nobody_waits_for_costs_no_run():
    model, journal = FakeModel(), Journal()

    async def scenario():
        async with batcher_of(model, journal, enough=2, max_batch_size=2) as batcher:
            busy = await occupy(batcher, model)
            gone = coming(batcher, range(2))
            await until(lambda: batcher.lanes.at_hand == 2, "both are at hand")
            await leave(*gone)
            model.gate.set()
            await asyncio.gather(*busy)
            await until(lambda: len(journal.reasons) == 2, "both are counted")

    asyncio.run(scenario())
    assert model.batches == [[1000]]
    assert journal.sizes == [1]


def test_who_asks_for_an_item_that_was_skipped_at_hand_is_answered_all_the_same():
    later = threading.Event()

    class Halting(FakeModel):
        def run(self, items):
            answers = super().run(items)
            assert items != [2] or later.wait(30)
            return answers

    model = Halting()

    async def scenario():
        async with batcher_of(model, enough=2, max_batch_size=2) as batcher:
            busy = await occupy(batcher, model)
            gone, stays = asyncio.create_task(submit(batcher, 1, key="one")), asyncio.create_task(submit(batcher, 2))
            await until(lambda: batcher.lanes.at_hand == 2, "both are at hand")
            await leave(gone)
            model.gate.set()
            await until(lambda: len(model.batches) == 2, "the other runs alone")
            again = asyncio.create_task(submit(batcher, 1, key="one"))
            await until(lambda: batcher.admitted == 2, "he has joined")
            later.set()
            assert await asyncio.gather(*busy, stays, again) == [2000, 4, 2]

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert model.batches == [[1000], [2], [1]]


def test_others_are_prepared_as_soon_as_what_was_at_hand_is_run():
    second = threading.Event()

    class Halting(FakeModel):
        def run(self, items):
            answers = super().run(items)
            assert items != [0, 1] or second.wait(30)
            return answers

    model, prepared = Halting(), []

    async def scenario():
        async with batcher_of(model, enough=2, max_batch_size=2, ahead=lambda: 3) as batcher:

            async def prepare_and_submit(item):
                turn = await batcher.lookahead.turn(deadline=batcher._clock() + 60, priority="normal")
                prepared.append(item)
                batcher.lookahead.end()
                return await submit(batcher, item, turn=turn)

            busy = await occupy(batcher, model)
            asked = [asyncio.create_task(prepare_and_submit(item)) for item in range(6)]
            await until(lambda: (batcher.lanes.at_hand, batcher.depth) == (2, 6), "two are at hand, one is prepared")
            assert prepared == [0, 1, 2]
            model.gate.set()
            await until(lambda: len(prepared) >= 5, "two more are prepared while the two are run")
            second.set()
            await asyncio.gather(*busy, *asked)

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert model.batches[:3] == [[1000], [0, 1], [2, 3]], "2 did not run alone"


def test_the_time_at_hand_counts_as_waiting_and_not_as_running():
    model, now, told = FakeModel(), [0.0], []

    class Stopwatch(Journal):
        def ran(self, size, queue_s, run_s):
            told.append((queue_s, run_s))

    async def scenario():
        async with batcher_of(model, Stopwatch(), enough=2, max_batch_size=2, clock=lambda: now[0]) as batcher:
            busy = await occupy(batcher, model)
            waiting = coming(batcher, range(2))
            await until(lambda: batcher.lanes.at_hand == 2, "both are at hand")
            now[0] = 10.0
            model.gate.set()
            await asyncio.gather(*busy, *waiting)

    asyncio.run(scenario())
    assert told == [([0.0], 10.0), ([10.0, 10.0], 0.0)]
