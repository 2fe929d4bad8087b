"""What tests of the queue share: a model that doubles numbers, an observer that remembers, and a batcher of both."""

import asyncio
import threading

from support import until

from service.batching import Batcher


class FakeModel:
    """Doubles numbers; runs only while its gate is open, fails on poison, remembers its batches."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[int]] = []
        self.poison: set[int] = set()
        self.short_from = 99

    def run(self, items):
        self.batches.append(list(items))
        assert self.gate.wait(30), "the test forgot to open the gate"
        if bad := self.poison.intersection(items):
            raise RuntimeError(f"poisoned by {bad}")
        answers = [2 * item for item in items]
        return answers[:-1] if len(items) >= self.short_from else answers


class Journal:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.reasons: list[str] = []
        self.joined = 0

    def ran(self, size, queue_s, run_s):
        assert len(queue_s) == size
        assert min(run_s, *queue_s) >= 0
        self.sizes.append(size)

    def dropped(self, reason):
        self.reasons.append(reason)

    def shared(self):
        self.joined += 1


def batcher_of(model: FakeModel, journal: Journal | None = None, **options) -> Batcher[int, int]:
    limits = {"max_batch_size": 8, "max_queue_size": 64, **options}
    return Batcher(model.run, observer=journal or Journal(), **limits)


async def submit(batcher: Batcher[int, int], item: int, within_s: float = 60, **options) -> int:
    with batcher.admit(1):
        return await batcher.submit(item, deadline=batcher._clock() + within_s, **options)


async def occupy(batcher: Batcher[int, int], model: FakeModel, lanes: int = 1) -> list[asyncio.Task[int]]:
    """Fill every lane with a run that waits at the gate."""
    model.gate.clear()
    running = []
    for lane in range(lanes):
        running.append(asyncio.create_task(submit(batcher, 1000 + lane)))
        await until(lambda count=lane + 1: len(model.batches) == count, "the lane runs")
    return running


async def queue_up(batcher: Batcher[int, int], items, **options) -> list[asyncio.Task[int]]:
    before = batcher.depth
    tasks = [asyncio.create_task(submit(batcher, item, **options)) for item in items]
    await until(lambda: batcher.depth == before + len(tasks), "all wait")
    return tasks
