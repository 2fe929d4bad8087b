"""Turns: nobody prepares further ahead than the lanes follow, the queue's order holds, and who must be late is told."""

import asyncio
from contextlib import suppress

import pytest
from batching_support import FakeModel, Journal, batcher_of, occupy, submit

from service.errors import DeadlineExceeded, InferenceFailed
from service.lookahead import FEWEST_TURNS, Lookahead


class Site:
    """A lookahead with a clock that stands still, and a queue that is a number."""

    def __init__(self, ahead: int = 2, run_pace_s: float = 9.0) -> None:
        self.now, self.ready, self.ahead, self.journal = 100.0, 0, ahead, Journal()
        self.lookahead = Lookahead(
            lambda: self.ahead, lambda: self.ready, lambda: run_pace_s, self.journal, lambda: self.now
        )
        self.order: list[object] = []

    def ask(self, name: object = None, *, within_s: float = 1000.0, priority="normal") -> asyncio.Task[float]:
        async def wait() -> float:
            turn = await self.lookahead.turn(deadline=self.now + within_s, priority=priority)
            self.order.append(name)
            return turn.waited_s

        return asyncio.create_task(wait())

    async def use(self, turns: int = 1) -> None:
        """Let so many turns end with nothing to run, which makes room for as many."""
        for _ in range(turns):
            self.lookahead.end()
            await settle()


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_turns_are_given_at_once_while_few_are_prepared_and_then_as_they_are_run():
    async def scenario():
        site = Site(ahead=3)
        asked = [site.ask(name) for name in range(6)]
        await settle()
        assert site.order == [0, 1, 2]
        assert len(site.lookahead) == 3

        site.ready += 1  # the first is prepared, and waits for a lane
        await site.use()
        assert site.order == [0, 1, 2]

        site.ready -= 1  # a lane takes it
        site.now += 7
        site.lookahead.advance()
        await settle()
        assert site.order == [0, 1, 2, 3]
        assert [await asked[0], await asked[3]] == [0.0, 7.0]

        await site.use(2)  # two turn out to be no images
        assert site.order == [0, 1, 2, 3, 4, 5]
        assert not len(site.lookahead)

    run(scenario)


def test_who_is_urgent_gets_the_next_turn_and_who_has_waited_longest_every_eighth():
    async def scenario():
        site = Site(ahead=1)
        site.ask("first")
        await settle()
        for name, priority in [("low", "low"), *((f"high {index}", "high") for index in range(9))]:
            site.ask(name, priority=priority)
            await settle()
            site.now += 1
        await site.use(10)
        assert site.order == ["first", *(f"high {index}" for index in range(7)), "low", "high 7", "high 8"]

    run(scenario)


@pytest.mark.parametrize("has_its_turn", [False, True], ids=["in line", "as its turn comes"])
def test_who_leaves_the_line_is_counted_and_keeps_no_turn_from_others(has_its_turn):
    async def scenario():
        site = Site(ahead=1)
        site.ask("first")
        await settle()
        leaver, _ = site.ask("leaver"), site.ask("last")
        await settle()
        if has_its_turn:
            site.lookahead._preparing -= 1  # so that it is given before the loop turns
            site.lookahead.advance()
        leaver.cancel()
        with suppress(asyncio.CancelledError):
            await leaver
        if not has_its_turn:
            await site.use()
        await settle()
        assert site.order == ["first", "last"]
        assert site.journal.reasons == ["cancelled"]

    run(scenario)


def test_the_deadline_ends_the_wait_for_a_turn():
    async def scenario():
        site = Site(ahead=1)
        site.ask("first")
        late = site.ask("late", within_s=0.02)  # the loop's timer is real
        with pytest.raises(DeadlineExceeded):
            await late
        assert site.journal.reasons == ["deadline"]
        assert not len(site.lookahead)

    run(scenario)


def test_a_turn_that_comes_after_the_deadline_is_not_given_though_the_timer_is_late_too():
    async def scenario():
        site = Site(ahead=1)
        site.ask("first")
        late, _ = site.ask("late", within_s=50), site.ask("next")
        await settle()
        site.now += 60
        await site.use()
        with pytest.raises(DeadlineExceeded):
            await late
        assert site.order == ["first", "next"]

    run(scenario)


async def crowd_behind_a_moving_line(site: Site) -> list[asyncio.Task[float]]:
    """Let 100 who have 2 s stand behind as many as tell a pace, one turn every 0.1 s, till one of them has his."""
    for name in range(1 + FEWEST_TURNS):
        site.ask(name)
    crowd = [site.ask(index, within_s=2.0) for index in range(100)]
    await settle()
    for _ in range(FEWEST_TURNS + 1):
        site.now += 0.1
        await site.use()
    return crowd


def test_who_stands_too_far_back_to_be_in_time_is_told_at_once_and_the_others_stay():
    async def scenario():
        site = Site(ahead=2)
        site.ready = 1  # one is always prepared
        crowd = await crowd_behind_a_moving_line(site)
        gone = [index for index, one in enumerate(crowd) if one.done() and one.exception() is not None]
        # Eight turns took 0.9 s, and 1.1 s are left, in which not ten come: twice as many stay, for some may leave.
        assert gone == list(range(20, 100))
        assert all(isinstance(crowd[index].exception(), DeadlineExceeded) for index in gone)
        assert site.journal.reasons == ["deadline"] * 80

    run(scenario)


def test_who_has_time_is_not_refused_with_the_hopeless_crowd_in_front_of_him():
    async def scenario():
        site = Site(ahead=2)
        site.ready = 1
        for name in range(1 + FEWEST_TURNS):
            site.ask(name)
        crowd = [site.ask(index, within_s=2.0) for index in range(100)]
        patient = site.ask("patient", within_s=5.5)
        await settle()
        for _ in range(FEWEST_TURNS + 1):
            site.now += 0.1
            await site.use()
        assert sum(one.done() and one.exception() is not None for one in crowd) == 80
        assert not patient.done()
        site.lookahead.fail("enough")
        await asyncio.gather(*crowd, patient, return_exceptions=True)

    run(scenario)


def test_who_will_be_the_oldest_soon_is_not_refused_for_all_who_are_more_urgent():
    async def scenario():
        site = Site(ahead=2)
        site.ready = 1
        site.ask("first")
        await settle()
        low = site.ask("low", within_s=10.0, priority="low")
        await settle()
        site.now += 0.001
        crowd = [site.ask(index, priority="high") for index in range(300)]
        await settle()
        for _ in range(FEWEST_TURNS + 3):
            site.now += 0.1
            await site.use()
        assert await low > 0
        site.lookahead.fail("enough")
        await asyncio.gather(*crowd, return_exceptions=True)

    run(scenario)


def test_a_line_that_moves_slower_than_the_lanes_run_is_judged_by_the_lanes():
    async def scenario():
        site = Site(ahead=2, run_pace_s=0.001)
        site.ready = 1
        crowd = await crowd_behind_a_moving_line(site)
        assert site.journal.reasons == []
        site.lookahead.fail("enough")
        await asyncio.gather(*crowd, return_exceptions=True)

    run(scenario)


def test_the_way_from_turn_to_answer_counts():
    async def scenario():
        site = Site(ahead=1)
        site.ask("first")
        site.lookahead.learn(3.0)
        await settle()
        late, timely = site.ask("late", within_s=2.9), site.ask("timely", within_s=3.1)
        await settle()
        site.lookahead.advance()
        with pytest.raises(DeadlineExceeded):
            await late
        await site.use()
        await timely
        assert site.order == ["first", "timely"]

    run(scenario)


def test_where_nothing_is_in_hand_what_was_measured_once_refuses_nobody():
    async def scenario():
        site = Site(ahead=1)
        site.ask("first")
        site.lookahead.learn(1e6)  # the machine slept
        asked = site.ask("next")
        await settle()
        await site.use()
        await asked
        assert site.order == ["first", "next"]

    run(scenario)


def test_the_batcher_gives_turns_as_its_lanes_take_items_and_counts_who_waits_for_one():
    model, prepared = FakeModel(), []

    async def scenario():
        async with batcher_of(model, max_batch_size=1, ahead=lambda: 2) as batcher:

            async def one(item: int) -> int:
                with batcher.admit(1):
                    deadline = batcher._clock() + 60
                    turn = await batcher.lookahead.turn(deadline=deadline, priority="normal")
                    prepared.append(item)
                    batcher.lookahead.end()
                    return await batcher.submit(item, deadline=deadline, turn=turn)

            busy = await occupy(batcher, model)
            asked = [asyncio.create_task(one(item)) for item in range(8)]
            await settle()
            assert prepared == [0, 1]
            assert batcher.depth == 8
            model.gate.set()
            assert await asyncio.gather(*busy, *asked) == [2000, *(2 * item for item in range(8))]
            assert prepared == list(range(8))

    run(scenario)


class BrokenJournal(Journal):
    def ran(self, size, queue_s, run_s):
        raise ZeroDivisionError("the observer broke")


def test_a_batcher_that_dies_tells_those_in_line():
    async def scenario():
        async with batcher_of(FakeModel(), BrokenJournal(), ahead=lambda: 0) as batcher:
            waiting = asyncio.create_task(batcher.lookahead.turn(deadline=batcher._clock() + 60, priority="normal"))
            await settle()
            with pytest.raises(InferenceFailed):
                await submit(batcher, 1)
            with pytest.raises(InferenceFailed):
                await waiting

    run(scenario)
