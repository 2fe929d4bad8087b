"""What a request may ask of the queue: its deadline and its place."""

import asyncio
import time

import pytest
from PIL import Image
from support import Engines, assert_problem, encode, random_pixels, running, until

from service.config import Settings
from service.errors import MalformedRequest
from service.routes.terms import priority_of_level, terms_of

FILES = [encode(Image.fromarray(one), "PNG") for one in random_pixels(6, seed=31)]


def within_s(asked: str) -> float:
    terms = terms_of({"x-request-timeout-ms": asked}, Settings(request_timeout_s=2.0))
    return terms.deadline - time.monotonic()


def test_a_request_may_ask_for_less_time_and_never_gets_more_than_the_setting():
    assert 0.2 < within_s("250") <= 0.25
    assert 1.9 < within_s("2000") <= 2.0
    assert 1.9 < within_s("3600000") <= 2.0
    assert 1.9 < within_s("9" * 400) <= 2.0


def test_a_time_that_the_caller_names_counts_from_when_his_request_arrived():
    settings = Settings(request_timeout_s=2.0)
    named = terms_of({"x-request-timeout-ms": "500"}, settings, since_last_byte_s=lambda: 0.3)
    unnamed = terms_of({}, settings, since_last_byte_s=lambda: 0.3)

    assert 0.1 < named.deadline - time.monotonic() <= 0.2
    assert 1.9 < unnamed.deadline - time.monotonic() <= 2.0


@pytest.mark.parametrize("asked", ["0", "-5", "1.5", "soon", "", "1e3", "٣"])
def test_a_time_that_is_not_one_is_refused(ask, asked):
    problem = assert_problem(
        ask("POST", "/predict", content=FILES[0], headers={"x-request-timeout-ms": asked.encode()}),
        400,
        "malformed-request",
    )
    assert "X-Request-Timeout-Ms" in problem["detail"]


def test_a_priority_that_is_not_one_is_refused(ask):
    response = ask("POST", "/predict", content=FILES[0], headers={"x-request-priority": "urgent"})

    assert "high, normal, low" in assert_problem(response, 400, "malformed-request")["detail"]


def test_a_v2_priority_of_zero_is_the_default_and_one_the_highest():
    assert [priority_of_level(level) for level in (0, 1, 2, 3, 99)] == ["normal", "high", "normal", "low", "low"]
    with pytest.raises(MalformedRequest):
        priority_of_level(-1)


def test_a_deadline_in_the_header_ends_the_wait_and_saves_the_run(models):
    engines = Engines()

    async def scenario():
        async with running(Settings(models=models, device="cpu", lanes=1), engines) as client:
            engine = engines.opened[0]
            engine.close_gate()
            busy = asyncio.create_task(client.post("/predict", content=FILES[0]))
            await until(engine.entered.is_set, "the lane is busy")
            late = await client.post("/predict", content=FILES[1], headers={"X-Request-Timeout-Ms": "50"})
            engine.gate.set()
            await busy
            return late, list(engine.sizes), (await client.get("/metrics")).text

    late, sizes, metrics = asyncio.run(asyncio.wait_for(scenario(), 30))

    assert_problem(late, 504, "deadline-exceeded")
    assert len(sizes) == 1
    assert 'foldserve_dropped_total{model="tiny",reason="deadline",version="1"} 1.0' in metrics
    assert 'foldserve_http_requests_total{code="504",reason="deadline-exceeded",route="/predict"} 1.0' in metrics


def test_a_body_that_arrives_after_the_deadline_is_too_late(models):
    async def slowly():
        yield FILES[0][:20]
        await asyncio.Event().wait()

    async def scenario():
        async with running(Settings(models=models, device="cpu"), Engines()) as client:
            return await client.post("/predict", content=slowly(), headers={"X-Request-Timeout-Ms": "50"})

    assert_problem(asyncio.run(asyncio.wait_for(scenario(), 30)), 504, "deadline-exceeded")


def test_a_request_of_high_priority_is_answered_before_those_who_came_first(models):
    engines, order = Engines(), []

    async def scenario():
        settings = Settings(models=models, device="cpu", lanes=1, max_batch_size=1)
        async with running(settings, engines) as client:
            engine, batcher = engines.opened[0], client._transport.app.state.service.classifier()._batcher
            engine.close_gate()

            async def ask(index: int, priority: str) -> None:
                await client.post("/predict", content=FILES[index], headers={"X-Request-Priority": priority})
                order.append(priority)

            busy = asyncio.create_task(ask(0, "normal"))
            await until(engine.entered.is_set, "the lane is busy")
            waiting = []
            for index, priority in enumerate(
                ("normal", "low", "normal", "high"), 1
            ):  # the first is next, whoever comes
                waiting.append(asyncio.create_task(ask(index, priority)))
                await until(lambda count=index: batcher.depth == count, "it waits")
            engine.gate.set()
            await asyncio.gather(busy, *waiting)

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert order == ["normal", "normal", "high", "normal", "low"]
