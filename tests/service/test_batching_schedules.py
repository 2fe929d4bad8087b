"""Any schedule of arrivals, departures, failures and deadlines gives each caller its own answer and no other's."""

import asyncio
import threading
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from support import until

from service.batching import Batcher
from service.errors import DeadlineExceeded, InferenceFailed

ARRIVE = st.tuples(st.just("arrive"), st.sampled_from(["patient", "poison", "late"]))
LEAVE = st.tuples(st.just("leave"), st.integers(0, 20))
STEP = st.tuples(st.just("run"), st.integers(1, 3))
SCHEDULES = st.lists(st.one_of(ARRIVE, ARRIVE, LEAVE, STEP), max_size=25)


@dataclass(frozen=True)
class Item:
    number: int
    kind: str


@dataclass
class SteppedModel:
    """Runs one batch for each permit; a batch with poison in it fails."""

    permits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    is_free: bool = False
    batches: list[list[Item]] = field(default_factory=list)

    def run(self, items):
        self.batches.append(list(items))
        assert self.is_free or self.permits.acquire(timeout=30)
        if any(item.kind == "poison" for item in items):
            raise ValueError("poison")
        return [f"answer {item.number}" for item in items]

    def finish(self) -> None:
        self.is_free = True
        self.permits.release(1000)


class Silent:
    def ran(self, size, queue_s, run_s):
        pass

    def dropped(self, reason):
        pass

    def shared(self):
        pass


async def call(batcher, item: Item) -> str:
    within_s = 0.001 if item.kind == "late" else 60
    with batcher.admit(1):
        return await batcher.submit(item, deadline=batcher._clock() + within_s)


async def play(schedule, batcher, model: SteppedModel) -> list[tuple[Item, object]]:
    callers: list[tuple[Item, asyncio.Task[str]]] = []
    async with batcher:
        for act, detail in schedule:
            if act == "arrive":
                item = Item(len(callers), detail)
                callers.append((item, asyncio.create_task(call(batcher, item))))
            elif act == "leave" and detail < len(callers):
                callers[detail][1].cancel()
            elif act == "run":
                model.permits.release(detail)
            await asyncio.sleep(0)
        await until(lambda: all(task.done() or task.cancelling() or started(task) for _, task in callers), "all began")
        model.finish()
        outcomes = await asyncio.gather(*(task for _, task in callers), return_exceptions=True)
    assert batcher.admitted == 0
    assert batcher.depth == 0
    return [(item, outcome) for (item, _), outcome in zip(callers, outcomes, strict=True)]


def started(task: asyncio.Task[str]) -> bool:
    return task.get_coro().cr_await is not None


@settings(deadline=None, max_examples=120)
@given(schedule=SCHEDULES, lanes=st.integers(1, 3), max_batch_size=st.integers(1, 5))
def test_every_caller_gets_its_own_answer_whatever_the_others_do(schedule, lanes, max_batch_size):
    model = SteppedModel()
    batcher = Batcher(model.run, observer=Silent(), max_batch_size=max_batch_size, max_queue_size=99, lanes=lanes)
    left = {detail for act, detail in schedule if act == "leave"}

    for item, outcome in asyncio.run(play(schedule, batcher, model)):
        allowed = {"patient": str, "poison": InferenceFailed, "late": (str, DeadlineExceeded)}[item.kind]
        if item.number in left:
            allowed = (str, InferenceFailed, DeadlineExceeded, asyncio.CancelledError)
        assert isinstance(outcome, allowed), (item, outcome)
        if isinstance(outcome, str):
            assert outcome == f"answer {item.number}"
    assert all(len(batch) <= max_batch_size for batch in model.batches)
