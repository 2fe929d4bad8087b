"""What is our own fault: a model that fails, a surprise. One answer, one image, and nothing private told."""

import asyncio
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from support import Engines, assert_problem, encode, predict_scope, random_pixels, running, serving, until

from service.config import Settings

FILES = [encode(Image.fromarray(one), "PNG") for one in random_pixels(4, seed=11)]
IMAGE = FILES[0]


def small(models: Path) -> Settings:
    return Settings(models=models, device="cpu", lanes=1, max_batch_size=4, mode="off")


def nan(images, logits):
    return np.full_like(logits, np.nan)


def short(images, logits):
    return logits[:-1]


def broken(images, logits):
    raise RuntimeError("a private detail of the engine")


@pytest.mark.parametrize("twist", [nan, short, broken])
def test_500_is_for_the_model_alone_and_tells_nothing_private(models, twist, caplog):
    engines = Engines()
    with serving(small(models), engines) as ask:
        engines.opened[0].twist = twist
        failed = ask("POST", "/predict", content=IMAGE)
        engines.opened[0].twist = None
        recovered = ask("POST", "/predict", content=IMAGE)

    document = assert_problem(failed, 500, "inference-failed")
    assert "private" not in json.dumps(document)
    assert caplog.records, "the log says why"
    assert recovered.status_code == 200


def test_a_model_that_fails_on_one_image_fails_only_that_one(models):
    culprit = random_pixels(4, seed=11)[2]

    def allergic(images, logits):
        assert not any(np.array_equal(image, culprit) for image in images)
        return logits

    engines = Engines()
    with serving(small(models), engines) as ask:
        engines.opened[0].twist = allergic
        answer = ask("POST", "/predict", files=[("file", ("x.png", content)) for content in FILES]).json()

    assert ["error" in one for one in answer["predictions"]] == [False, False, True, False]


def test_a_surprise_is_a_problem_document_and_is_counted(models, caplog):
    async def scenario():
        async with running(small(models), Engines()) as client:
            app = client._transport.app
            app.add_api_route("/surprise", lambda: 1 / 0)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as outside:
                return await outside.get("/surprise"), (await outside.get("/metrics")).text

    surprised, metrics = asyncio.run(scenario())

    assert "division" not in json.dumps(assert_problem(surprised, 500, "internal"))
    assert "division by zero" in caplog.text
    assert 'code="500",reason="internal",route="/surprise"' in metrics


def test_a_caller_that_hangs_up_costs_no_run(models):
    engines = Engines()

    async def scenario():
        async with running(small(models), engines) as client:
            app, engine = client._transport.app, engines.opened[0]
            engine.close_gate()
            busy = asyncio.create_task(client.post("/predict", content=FILES[0]))
            await until(engine.entered.is_set, "the engine runs")
            messages = iter([{"type": "http.request", "body": FILES[1], "more_body": False}])

            async def receive():
                return next(messages, {"type": "http.disconnect"})

            async def send(message):
                pass

            gone = asyncio.create_task(app(predict_scope(), receive, send))
            stays = asyncio.create_task(client.post("/predict", content=FILES[2]))
            batcher = app.state.service.classifier()._batcher
            await until(lambda: gone.done() or batcher.depth == 2, "the caller has gone or both wait")
            engine.gate.set()
            await asyncio.gather(busy, gone, stays)
            return engine.sizes

    assert asyncio.run(scenario()) == [1, 1]
