"""Many real connections on a slow model: no work for those who left, no wait past a deadline, and the next is next."""

import asyncio
import re
import socket
from contextlib import asynccontextmanager

import uvicorn
from PIL import Image
from support import Engines, encode, random_pixels, until

from service.app import create_app
from service.config import Settings

CROWD = 512
FILES = [encode(Image.fromarray(one), "PNG") for one in random_pixels(CROWD + 2, seed=51)]


@asynccontextmanager
async def listening(models, engines: Engines, **options):
    """Yield a port and the service of a real server on a loopback port, on this event loop."""
    settings = Settings(models=models, **{"device": "cpu", "lanes": 1, "max_batch_size": 4, **options})
    app = create_app(settings, open_engine=engines)
    listener = socket.create_server(("127.0.0.1", 0), backlog=CROWD)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
    server.install_signal_handlers = lambda: None
    task = asyncio.create_task(server._serve([listener]))
    await until(lambda: server.started and app.state.service.is_ready, "ready")
    try:
        yield listener.getsockname()[1], app.state.service
    finally:
        for engine in engines.opened:
            engine.gate.set()
        server.should_exit = True
        await task
        listener.close()


async def send(port: int, content: bytes, *headers: str):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = ["POST /predict HTTP/1.1", "host: x", "connection: close", f"content-length: {len(content)}", *headers]
    writer.write("\r\n".join([*head, "", ""]).encode() + content)
    await writer.drain()
    return reader, writer


async def answer(reader, writer) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(), 30)
    finally:
        writer.close()
        await writer.wait_closed()


def test_work_for_callers_who_left_is_not_done_and_the_next_caller_is_answered_next(models):
    engines = Engines()

    async def scenario():
        async with listening(models, engines, max_queue_size=CROWD + 8, max_batch_size=1) as (port, service):
            engine, batcher = engines.opened[0], service.classifier()._batcher
            engine.close_gate()
            busy = await send(port, FILES[-1])
            await until(engine.entered.is_set, "the lane is busy")
            crowd = [await send(port, content) for content in FILES[:CROWD]]
            await until(lambda: batcher.admitted == 1 + CROWD, "all wait")
            for _, writer in crowd:
                writer.close()
            await until(lambda: batcher.admitted == 1, "the service knows that they have gone")
            following = await send(port, FILES[-2])
            await until(lambda: batcher.admitted == 2, "the next caller waits")
            engine.gate.set()
            statuses = [(await answer(*one))[9:12] for one in (busy, following)]
            return statuses, list(engine.sizes), service.metrics.exposition().decode()

    statuses, sizes, metrics = asyncio.run(asyncio.wait_for(scenario(), 60))

    assert statuses == [b"200", b"200"]
    assert sizes == [1, 1]
    assert 'foldserve_dropped_total{model="tiny",reason="cancelled",version="1"} 512.0' in metrics
    assert 'http_requests_total{code="499",reason="caller-gone",route="/predict"} 512.0' in metrics


def test_a_crowd_on_a_stuck_model_is_answered_by_its_deadline_or_refused_at_once(models):
    engines = Engines()

    async def scenario():
        async with listening(models, engines, max_queue_size=100, max_images=8) as (port, service):
            engine = engines.opened[0]
            engine.close_gate()
            asked = [await send(port, content, "x-request-timeout-ms: 400") for content in FILES[:CROWD]]
            answers = await asyncio.gather(*(answer(*one) for one in asked))
            late = engine.sizes.copy()
            engine.gate.set()
            (after,) = [await answer(*await send(port, FILES[-1]))]
            return answers, late, after, service.metrics.exposition().decode()

    answers, late, after, metrics = asyncio.run(asyncio.wait_for(scenario(), 60))

    statuses = [one[9:12] for one in answers]
    assert set(statuses) <= {b"429", b"504"}
    assert statuses.count(b"504") >= 100
    assert all(re.search(rb"retry-after: [1-9]", one) for one in answers if one[9:12] == b"429")
    assert sum(late) <= 4, "what ran before the model stuck, and nothing for those who were answered 504"
    assert after[9:12] == b"200"
    for status, reason in ((b"429", "queue-full"), (b"504", "deadline-exceeded")):
        labels = f'code="{status.decode()}",reason="{reason}",route="/predict"'
        found = re.search(re.escape(f"http_requests_total{{{labels}}}") + r" (\S+)", metrics)
        assert float(found[1] if found else 0) == statuses.count(status)
