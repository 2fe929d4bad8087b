"""What goes wrong is told as a problem document with the right status, and never as a 500 for what a client sent."""

import asyncio
import shutil
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import (
    Engines,
    TinyModel,
    assert_problem,
    black_png,
    encode,
    predict_scope,
    random_pixels,
    running,
    serving,
    until,
)

from service.config import Settings

FILES = [encode(Image.fromarray(one), "PNG") for one in random_pixels(4, seed=11)]
IMAGE = FILES[0]


def small(models: Path, **options) -> Settings:
    return Settings(models=models, **{"device": "cpu", "lanes": 1, "mode": "off", **options})


def test_400_for_an_empty_body(ask):
    assert_problem(ask("POST", "/predict"), 400, "malformed-request")


@pytest.mark.parametrize("path", ["/predict?model=dog", "/predict?version=2", "/predict?model=../tiny"])
def test_404_for_a_model_that_is_not_served(ask, path):
    assert_problem(ask("POST", path, content=IMAGE), 404, "model-not-found")


def test_404_for_a_model_that_is_described_but_not_there(ask):
    assert_problem(ask("GET", "/models/dog"), 404, "model-not-found")


@pytest.mark.parametrize(
    ("method", "path", "told"),
    [
        ("GET", "/predictions/tiny", "did you mean /predict?"),  # TorchServe's
        ("PUT", "/predict/seven.png", "did you mean /predict?"),  # curl -T seven.png http://host/predict/
        ("POST", "/predict/", "did you mean /predict?"),
        ("GET", "/models/tiny/", "did you mean /models/tiny?"),
        ("GET", "/modles", "did you mean /models?"),
        ("GET", "/nope", "nothing at /nope; /docs lists"),
    ],
)
def test_404_for_a_path_that_is_not_there_says_which_one_is(ask, method, path, told):
    response = ask(method, path, headers={"host": "other.example"})

    assert told in assert_problem(response, 404, "no-such-path")["detail"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/"])
def test_probes_may_ask_with_head(ask, path):
    refused = ask("DELETE", path)

    assert ask("HEAD", path).status_code == 200
    assert refused.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH"])
def test_405_names_the_methods_that_are_possible(ask, method):
    response = ask(method, "/predict")

    assert_problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST, PUT"
    assert response.json()["detail"] == f"{method} is not possible at /predict; possible is POST, PUT"


def test_408_for_a_body_that_does_not_arrive(models):
    async def trickle():
        yield IMAGE[:10]
        await asyncio.Event().wait()

    async def scenario():
        async with running(small(models, body_timeout_s=0.1), Engines()) as client:
            return await client.post("/predict", content=trickle())

    assert_problem(asyncio.run(scenario()), 408, "body-too-slow")


@pytest.mark.parametrize("announced", [True, False])
def test_413_stops_reading_a_body_over_the_limit(models, announced):
    taken = 0

    async def endless():
        nonlocal taken
        for _ in range(10_000):
            taken += 1
            yield b"\0" * 1024

    async def scenario():
        headers = {"content-length": str(10_000 * 1024)} if announced else {}
        async with running(small(models, max_body_bytes=10 * 1024), Engines()) as client:
            app = client._transport.app
            return await ask_and_stop_reading(app, endless(), headers)

    status = asyncio.run(scenario())

    assert status == 413
    assert taken <= (0 if announced else 11)


async def ask_and_stop_reading(app, chunks, headers) -> int:
    """Call the app by hand; once it has begun to answer, give it nothing more to read. Return the status."""
    statuses: list[int] = []

    async def receive():
        if statuses:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": await anext(chunks), "more_body": True}

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(predict_scope(headers), receive, send)
    return statuses[0]


def test_413_for_too_many_pixels(ask):
    document = assert_problem(ask("POST", "/predict", content=black_png(13_000)), 413, "too-large")

    assert "50,000,000 pixels" in document["detail"]


@pytest.mark.parametrize("media_type", ["text/plain", "text/html", "application/xml", "video/mp4"])
def test_415_for_a_content_type_that_is_not_accepted(ask, media_type):
    response = ask("POST", "/predict", content=IMAGE, headers={"content-type": media_type})

    assert media_type in assert_problem(response, 415, "unsupported-format")["detail"]


def test_415_for_a_body_compressed_in_a_way_that_is_not_accepted(ask):
    response = ask("POST", "/predict", content=IMAGE, headers={"content-encoding": "br"})

    assert_problem(response, 415, "unsupported-format")


def test_415_for_text_that_calls_itself_an_image(ask):
    response = ask("POST", "/predict", content=b"hello", headers={"content-type": "image/png"})

    assert_problem(response, 415, "unsupported-format")


def test_422_for_a_truncated_image(ask):
    jpeg = encode(Image.fromarray(random_pixels(1, side=64)[0]), "JPEG")

    assert_problem(ask("POST", "/predict", content=jpeg[: len(jpeg) // 2]), 422, "invalid-image")


def test_429_with_a_retry_after_when_the_queue_is_full(models):
    engines = Engines()

    async def scenario():
        async with running(small(models, max_queue_size=2, max_images=2), engines) as client:
            engines.opened[0].close_gate()
            waiting = [asyncio.create_task(client.post("/predict", content=content)) for content in FILES[:2]]
            app = client._transport.app
            await until(lambda: app.state.service.classifier()._batcher.admitted == 2, "the queue is full")
            refused = await client.post("/predict", content=IMAGE)
            assert (await client.get("/healthz")).status_code == 200
            engines.opened[0].gate.set()
            assert [response.status_code for response in await asyncio.gather(*waiting)] == [200, 200]
            return refused

    refused = asyncio.run(scenario())

    assert_problem(refused, 429, "queue-full")
    assert int(refused.headers["retry-after"]) >= 1


def test_503_while_loading_and_again_while_draining(models):
    from service.app import create_app

    async def scenario():
        app = create_app(small(models), open_engine=Engines())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            for status in ("loading", "draining"):
                app.state.service.status = status
                for response in (await client.post("/predict", content=IMAGE), await client.get("/readyz")):
                    assert status in assert_problem(response, 503, "not-ready")["detail"]
                    assert int(response.headers["retry-after"]) >= 1
                assert (await client.get("/healthz")).status_code == 200

    asyncio.run(scenario())


def test_504_when_the_deadline_passes(models):
    engines = Engines()

    async def scenario():
        async with running(small(models, request_timeout_s=0.2), engines) as client:
            engines.opened[0].close_gate()
            late = await client.post("/predict", content=IMAGE)
            engines.opened[0].gate.set()
            return late, await client.post("/predict", content=IMAGE)

    late, fine = asyncio.run(scenario())

    assert_problem(late, 504, "deadline-exceeded")
    assert fine.status_code == 200


@settings(deadline=None, max_examples=60)
@given(
    content=st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda tail: IMAGE[:90] + tail)),
    media_type=st.sampled_from(
        [
            "",
            "image/png",
            "application/json",
            "multipart/form-data; boundary=B",
            "multipart/form-data",
            "text/plain",
            ";",
        ]
    ),
    query=st.text(st.characters(codec="ascii"), max_size=12),
)
def test_whatever_a_client_sends_is_never_a_500(ask, content, media_type, query):
    headers = {"content-type": media_type} if media_type else {}

    response = ask(
        "POST", httpx.URL("/predict", params={"model": query} if query else {}), content=content, headers=headers
    )

    assert response.status_code in {200, 400, 404, 413, 415, 422}
    assert response.status_code == 200 or response.headers["content-type"] == "application/problem+json"


def test_two_models_need_a_name_unless_a_default_is_set(tmp_path, models):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    TinyModel(mode="L", name="gray").write(tmp_path)

    with serving(small(tmp_path)) as ask:
        assert_problem(ask("POST", "/predict", content=IMAGE), 400, "malformed-request")
        assert ask("POST", "/predict?model=gray", content=IMAGE).json()["model"] == "gray"
    with serving(small(tmp_path, default_model="tiny")) as ask:
        assert ask("POST", "/predict", content=IMAGE).json()["model"] == "tiny"
