"""What a request may cost: judged before its body is read, bounded while it arrives, ended with its deadline."""

import asyncio
import base64
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from support import Engines, assert_problem, encode, predict_scope, random_pixels, running, until

from service.config import Settings
from service.small_files import QUICK_BYTES

FILES = [encode(Image.fromarray(one), "PNG") for one in random_pixels(3, side=40, seed=11)]
IMAGE = FILES[0]
LIMIT = 12_000
assert min(map(len, FILES)) > QUICK_BYTES  # so that they go through the pool
assert max(map(len, FILES)) < LIMIT // 2


def small(models: Path, **options) -> Settings:
    return Settings(models=models, **{"device": "cpu", "lanes": 1, **options})


async def in_two(first_half_read: asyncio.Event, go_on: asyncio.Event) -> AsyncIterator[bytes]:
    """Send an image without announcing its length: half of it, and the rest when it may go on."""
    yield IMAGE[:40]
    first_half_read.set()
    await go_on.wait()
    yield IMAGE[40:]


def test_a_full_queue_is_told_before_a_byte_of_the_body_is_read(models):
    engines = Engines()
    reads = 0
    statuses: list[int] = []

    async def receive():
        nonlocal reads
        reads += 1
        await asyncio.Event().wait()

    async def send(message):
        statuses.append(message.get("status", 0))

    async def scenario():
        async with running(small(models, max_queue_size=2, max_images=2), engines) as client:
            engines.opened[0].close_gate()
            app = client._transport.app
            waiting = [asyncio.create_task(client.post("/predict", content=content)) for content in FILES[:2]]
            await until(lambda: app.state.service.classifier()._batcher.admitted == 2, "the queue is full")
            await asyncio.wait_for(app(predict_scope({"content-length": "100"}), receive, send), 10)
            engines.opened[0].gate.set()
            await asyncio.gather(*waiting)

    asyncio.run(scenario())

    assert statuses[0] == 429
    assert reads == 0


def test_bodies_that_arrive_together_are_bounded_in_bytes(models):
    async def scenario():
        settings = small(models, max_body_bytes=LIMIT, max_bytes_in_flight=LIMIT + LIMIT // 2)
        async with running(settings, Engines()) as client:
            half_read, go_on = asyncio.Event(), asyncio.Event()
            slow = asyncio.create_task(client.post("/predict", content=in_two(half_read, go_on)))
            await asyncio.wait_for(half_read.wait(), 10)
            refused = await client.post("/predict", content=in_two(asyncio.Event(), go_on))  # may grow to the limit too
            fits = await client.post("/predict", content=IMAGE)  # says that it is small
            go_on.set()
            arrived = await slow
            after = await client.post("/predict", content=in_two(asyncio.Event(), go_on))
            return refused, fits, arrived, after

    refused, *answered = asyncio.run(asyncio.wait_for(scenario(), 30))

    assert_problem(refused, 429, "queue-full")
    assert int(refused.headers["retry-after"]) >= 1
    assert [response.status_code for response in answered] == [200, 200, 200]


def test_a_body_that_is_given_up_makes_room_again(models):
    async def scenario():
        settings = small(models, max_body_bytes=LIMIT, max_bytes_in_flight=LIMIT, body_timeout_s=0.1)
        async with running(settings, Engines()) as client:
            for _ in range(3):
                stalled = in_two(asyncio.Event(), asyncio.Event())
                assert_problem(await client.post("/predict", content=stalled), 408, "body-too-slow")
                long = await client.post("/predict", content=bytes(2 * LIMIT))
                assert_problem(long, 413, "too-large")
            assert (await client.post("/predict", content=IMAGE)).status_code == 200

    asyncio.run(scenario())


def test_a_small_image_is_decoded_at_once_only_where_it_is_alone(models):
    release = threading.Event()
    quick = encode(Image.fromarray(random_pixels(1)[0]), "PNG")
    twice = {"images": [base64.b64encode(quick).decode()] * 2}

    async def scenario():
        async with running(small(models, decode_threads=1, request_timeout_s=1), Engines()) as client:
            client._transport.app.state.service.classifier()._preparer.decoders._threads.submit(release.wait, 30)
            try:
                return await client.post("/predict", content=quick), await client.post("/predict", json=twice)
            finally:
                release.set()

    alone, several = asyncio.run(scenario())

    assert alone.status_code == 200
    assert several.status_code != 200
    assert "deadline" in several.text


def test_an_image_that_waits_to_be_decoded_past_its_deadline_is_answered_and_never_decoded(models):
    release = threading.Event()

    async def scenario():
        async with running(small(models, decode_threads=1, request_timeout_s=0.2), Engines()) as client:
            decoders = client._transport.app.state.service.classifier()._preparer.decoders._threads
            decoders.submit(release.wait, 30)
            try:
                late = await asyncio.wait_for(client.post("/predict", content=IMAGE), 10)
            finally:
                release.set()
            await asyncio.to_thread(decoders.submit(int).result)  # all that waited before it has been dealt with
            return late, (await client.get("/metrics")).text

    late, metrics = asyncio.run(scenario())

    assert_problem(late, 504, "deadline-exceeded")
    assert 'foldserve_stage_duration_seconds_count{model="tiny",stage="decode",version="1"} 0.0' in metrics


def test_a_request_that_is_being_decoded_when_the_service_stops_is_answered(models):
    release = threading.Event()

    async def scenario():
        async with running(small(models, decode_threads=1), Engines()) as client:
            service = client._transport.app.state.service
            batcher = service.classifier()._batcher
            service.classifier()._preparer.decoders._threads.submit(release.wait, 30)
            asked = asyncio.create_task(client.post("/predict", content=IMAGE))
            await until(lambda: batcher.admitted == 1, "the image is let in")
            stopping = asyncio.create_task(service.stop())
            await until(lambda: batcher._draining, "draining")
            for _ in range(20):  # loop turns in which a lane with nothing to do could end
                await asyncio.sleep(0)
            release.set()
            response = await asked
            await asyncio.wait_for(stopping, 10)
            return response

    assert asyncio.run(scenario()).status_code == 200


class Surprising(ThreadPoolExecutor):
    """Decoders of which one image gets out what nobody foresaw, as a lack of memory would."""

    def submit(self, function, *arguments):
        return super().submit(self._fail) if FILES[1] in arguments else super().submit(function, *arguments)

    def _fail(self):
        raise MemoryError("a surprise")


def test_a_surprise_in_one_image_fails_it_alone_and_its_neighbours_stay_admitted(models, caplog):
    engines = Engines()

    async def scenario():
        async with running(small(models, request_timeout_s=30), engines) as client:
            classifier = client._transport.app.state.service.classifier()
            decoders = classifier._preparer.decoders
            decoders._threads, real = Surprising(2), decoders._threads
            engines.opened[0].close_gate()
            files = [("file", ("x.png", content)) for content in FILES]
            asked = asyncio.create_task(client.post("/predict", files=files))
            await until(lambda: asked.done() or "nobody foresaw" in caplog.text, "the surprise")
            admitted = classifier._batcher.admitted
            engines.opened[0].gate.set()
            response = await asked
            decoders._threads.shutdown()
            decoders._threads = real
            return admitted, response, classifier._batcher.admitted

    during, response, after = asyncio.run(scenario())

    assert ["error" in one for one in response.json()["predictions"]] == [False, True, False]
    assert response.json()["predictions"][1]["error"]["status"] == 500
    assert "surprise" not in response.text
    assert (during, after) == (3, 0)
