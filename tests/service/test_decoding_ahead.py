"""Images are decoded only as far ahead as the lanes can follow; who waits for that is in the queue like anybody."""

import asyncio
import io
import re

import numpy as np
from PIL import Image
from support import Engines, assert_problem, encode, random_pixels, running, until

from service.config import Settings

FILES = [encode(Image.fromarray(one), "BMP") for one in random_pixels(24, seed=71)]  # decoded in the pool
TINY = encode(Image.fromarray(random_pixels(1, seed=72)[0]), "PNG")  # decoded on the event loop
AHEAD = 2  # images: one lane that runs one at a time, and one thread that decodes


def settings_of(models, **options) -> Settings:
    limits = {"lanes": 1, "max_batch_size": 1, "decode_threads": 1, "max_queue_size": 64, **options}
    return Settings(models=models, device="cpu", share_identical=False, **limits)


class Stage:
    """A service whose only lane is stuck, and what its metrics say."""

    def __init__(self, client, engines: Engines) -> None:
        self.client, self.engine = client, engines.opened[0]
        self.batcher = client._transport.app.state.service.classifier()._batcher
        self.asked: list[asyncio.Task] = []

    async def occupy(self) -> None:
        self.engine.close_gate()
        self.ask(TINY)
        await until(self.engine.entered.is_set, "the lane is busy")

    def ask(self, content: bytes, **headers: str) -> asyncio.Task:
        task = asyncio.create_task(self.client.post("/predict", content=content, headers=headers))
        self.asked.append(task)
        return task

    async def crowd(self) -> None:
        waiting = self.batcher.depth
        for count, content in enumerate(FILES, 1):
            self.ask(content)
            await until(lambda count=count: self.batcher.depth >= waiting + count - AHEAD, "it waits")
        await until(lambda: self.batcher.depth == waiting + len(FILES), "all wait")

    async def metric(self, pattern: str) -> float:
        text = (await self.client.get("/metrics")).text
        found = re.search(pattern + r"\S* (\S+)", text)
        return float(found[1]) if found else 0.0


def run(models, scenario, **options):
    engines = Engines()

    async def whole():
        async with running(settings_of(models, **options), engines) as client:
            stage = Stage(client, engines)
            try:
                return await scenario(stage)
            finally:
                stage.engine.gate.set()
                await asyncio.gather(*stage.asked, return_exceptions=True)

    return asyncio.run(asyncio.wait_for(whole(), 60))


def test_a_crowd_is_decoded_as_the_lanes_take_it_and_waits_in_the_queue_until_then(models):
    async def scenario(stage: Stage):
        await stage.occupy()
        await stage.crowd()
        decoded = await stage.metric('stage_duration_seconds_count{model="tiny",stage="decode"')
        depth = await stage.metric("queue_depth{")
        pending = await stage.metric("pending_request_count{")
        stage.engine.gate.set()
        statuses = [one.status_code for one in await asyncio.gather(*stage.asked)]
        after = await stage.metric('stage_duration_seconds_count{model="tiny",stage="decode"')
        queued = await stage.metric('stage_duration_seconds_count{model="tiny",stage="queue"')
        return decoded, depth, pending, statuses, after, queued

    decoded, depth, pending, statuses, after, queued = run(models, scenario)

    assert decoded <= 1 + AHEAD
    assert (depth, pending) == (len(FILES), 1 + len(FILES))
    assert set(statuses) == {200}
    assert after == queued == 1 + len(FILES)


def test_the_time_until_the_turn_is_queueing_and_not_decoding(models):
    async def scenario(stage: Stage):
        await stage.occupy()
        await stage.crowd()
        await asyncio.sleep(0.2)  # what is measured
        stage.engine.gate.set()
        await asyncio.gather(*stage.asked)
        seconds = 'stage_duration_seconds_sum{model="tiny",stage="%s"'
        return await stage.metric(seconds % "queue"), await stage.metric(seconds % "decode")

    queue_s, decode_s = run(models, scenario)

    assert queue_s >= 0.2 * len(FILES)
    assert decode_s < 0.2 * len(FILES) / 2


def test_who_waits_to_be_decoded_is_refused_nothing_less_and_counts_for_the_limit(models):
    async def scenario(stage: Stage):
        await stage.occupy()
        await stage.crowd()
        return await stage.client.post("/predict", content=FILES[0])

    refused = run(models, scenario, max_queue_size=1 + len(FILES), max_images=8)

    assert_problem(refused, 429, "queue-full")
    assert int(refused.headers["retry-after"]) >= 1


def test_who_leaves_before_he_is_decoded_is_gone_at_once_and_costs_nothing(models):
    async def scenario(stage: Stage):
        await stage.occupy()
        await stage.crowd()
        for task in stage.asked[1:]:
            task.cancel()
        await until(lambda: stage.batcher.admitted == 1, "the service knows")
        decoded = await stage.metric('stage_duration_seconds_count{model="tiny",stage="decode"')
        stage.engine.gate.set()
        after = await stage.client.post("/predict", content=FILES[0])
        dropped = await stage.metric('dropped_total{model="tiny",reason="cancelled"')
        return stage.batcher.depth, dropped, decoded, after.status_code, list(stage.engine.sizes)

    depth, dropped, decoded, status, sizes = run(models, scenario)

    assert (depth, dropped, status) == (0, len(FILES), 200)
    assert decoded <= 1 + AHEAD
    assert sizes == [1, 1]


def test_a_deadline_ends_the_wait_to_be_decoded(models):
    async def scenario(stage: Stage):
        await stage.occupy()
        await stage.crowd()
        late = await stage.ask(FILES[0], **{"X-Request-Timeout-Ms": "50"})
        return late, await stage.metric('dropped_total{model="tiny",reason="deadline"')

    late, dropped = run(models, scenario)

    assert_problem(late, 504, "deadline-exceeded")
    assert dropped == 1


def test_an_image_that_costs_nothing_to_decode_stands_behind_those_who_wait_for_it(models):
    order: list[str] = []

    async def scenario(stage: Stage):
        await stage.occupy()
        await stage.crowd()
        stage.ask(TINY).add_done_callback(lambda _: order.append("tiny"))
        await until(lambda: stage.batcher.depth == len(FILES) + 1, "it waits")
        for task in stage.asked[1:-1]:
            task.add_done_callback(lambda _: order.append("large"))
        stage.engine.gate.set()
        await asyncio.gather(*stage.asked)

    run(models, scenario)

    assert order.index("tiny") >= len(FILES) - AHEAD  # once it has its turn it is ready at once


def test_one_bad_image_in_the_line_gives_its_turn_to_the_next(models):
    async def scenario(stage: Stage):
        await stage.occupy()
        for at in range(6):
            stage.ask(FILES[at] if at % 2 else FILES[at][:70])
        await until(lambda: stage.batcher.depth == 4, "two are prepared, and the last bad and good one wait")
        stage.engine.gate.set()
        return [one.status_code for one in await asyncio.gather(*stage.asked[1:])]

    assert run(models, scenario) == [422, 200] * 3


def test_many_images_of_one_request_take_their_turns_one_by_one(models):
    async def scenario(stage: Stage):
        await stage.occupy()
        files = [("file", ("a.bmp", io.BytesIO(content))) for content in FILES[:12]]
        many = asyncio.create_task(stage.client.post("/predict", files=files))
        await until(lambda: stage.batcher.depth == 12, "all wait")
        stage.engine.gate.set()
        return await many

    answer = run(models, scenario)

    assert answer.status_code == 200
    assert len(answer.json()["predictions"]) == 12
    assert all(np.isfinite(one["score"]) for one in answer.json()["predictions"])
