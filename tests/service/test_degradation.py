"""Any arrival pattern gets the lone answer's bits; where an engine turns faulty, a spot check finds it and says so."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from PIL import Image
from support import Engines, encode, random_pixels, running, serving, until

from service.config import Settings
from service.engine import Shape
from service.planning import Planner

FILES = [encode(Image.fromarray(one), "PNG") for one in random_pixels(12, seed=19)]
LARGEST = 8
WATCHED = {"device": "cpu", "lanes": 1, "spot_check_share": 1.0}


def files_of(indices) -> dict:
    return {"files": [("file", (f"{index}.png", FILES[index])) for index in indices], "params": {"logits": "true"}}


def bits(response) -> list[list[int]]:
    assert response.status_code == 200, response.text
    logits = [one["logits"] for one in response.json()["predictions"]]
    return np.array(logits, np.float32).view(np.uint32).tolist()


def favour_company(classifier) -> None:
    """Plan as on a machine where a full batch costs what a lone image does, which alone is best on many threads."""
    certified = {record.shape for record in classifier.certificate.shapes}
    assert Shape(LARGEST, 1) in certified
    classifier.runner._planner = Planner({shape: 1.0 / shape.threads for shape in certified})


@pytest.fixture(scope="module")
def arrivals(models, state):
    """A function that sends requests, each of some of FILES, all at once; its answers as bits; and the engine."""
    engines = Engines()
    settings = Settings(models=models, device="cpu", lanes=2, state=state, max_queue_delay_ms=1)
    with serving(settings, engines) as ask, ThreadPoolExecutor(8) as callers:

        def send(requests):
            asked = [callers.submit(ask, "POST", "/predict", **files_of(request)) for request in requests]
            return [bits(one.result()) for one in asked]

        yield send, engines.opened[0]


REQUESTS = st.lists(st.lists(st.integers(0, len(FILES) - 1), min_size=1, max_size=9), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def alone(arrivals):
    send, engine = arrivals
    engine.twist = None
    return [send([[index]])[0][0] for index in range(len(FILES))]


@given_settings(max_examples=40, deadline=None)
@given(requests=REQUESTS)
def test_any_arrival_pattern_gives_each_image_the_bits_of_its_lone_answer(arrivals, alone, requests):
    send, _ = arrivals

    assert send(requests) == [[alone[index] for index in request] for request in requests]


def test_the_patterns_above_do_form_batches_and_would_show_a_flipped_bit(arrivals, alone):
    send, engine = arrivals
    requests = [list(range(9))] * 8
    engine.sizes.clear()
    engine.twist = flip_in_crowds
    try:
        answers = send(requests)
    finally:
        engine.twist = None

    assert max(engine.sizes) > 1
    assert answers != [[alone[index] for index in request] for request in requests]


def flip_in_crowds(images: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Change the last bit of one logit in every batch of several."""
    wrong = logits.copy()
    if len(images) > 1:
        wrong.view(np.uint32)[0, 0] ^= 1
    return wrong


class Once:
    """Changes one bit of the next run and of none after."""

    def __init__(self) -> None:
        self.is_armed = True

    def __call__(self, images: np.ndarray, logits: np.ndarray) -> np.ndarray:
        wrong = logits.copy()
        wrong.view(np.uint32)[0, 0] ^= self.is_armed
        self.is_armed = False
        return wrong


class Drift:
    """Gives other bits each time."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, images: np.ndarray, logits: np.ndarray) -> np.ndarray:
        self.runs += 1
        wrong = logits.copy()
        wrong.view(np.uint32)[:, 0] ^= self.runs
        return wrong


async def value(client, name: str, **labels: str) -> float:
    """Return a metric's value, 0 where there is no such series."""
    text = (await client.get("/metrics")).text
    wanted = ",".join(f'{key}="{labels[key]}"' for key in sorted(labels))
    found = re.search(rf"^{re.escape(f'{name}{{{wanted}}}')} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def checks(client, verdict: str) -> float:
    return await value(client, "foldserve_spot_checks_total", model="tiny", version="1", verdict=verdict)


async def until_checked(client, count: int) -> None:
    """Wait until `count` spot checks have a verdict, whatever it is."""
    metrics = client._transport.app.state.service.metrics
    verdict = re.compile(r"^foldserve_spot_checks_total\{.*\} (\S+)$", re.MULTILINE)
    await until(
        lambda: sum(map(float, verdict.findall(metrics.exposition().decode()))) == count, f"{count} spot checks"
    )


async def assert_degraded_and_said_so(client) -> None:
    ready = await client.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "degraded"}), "503 would eject a whole fleet"
    assert (await client.get("/info")).json()["models"]["tiny"]["degraded"] is True
    assert await value(client, "foldserve_degraded", model="tiny", version="1") == 1
    assert "\nfoldserve_ready 1.0\n" in (await client.get("/metrics")).text


def test_an_engine_that_flips_a_bit_in_crowds_is_caught_and_runs_alone_from_then_on(models, caplog):
    engines = Engines()

    async def scenario():
        async with running(Settings(models=models, **WATCHED), engines) as client:
            classifier, engine = client._transport.app.state.service.classifier(), engines.opened[0]
            favour_company(classifier)
            lone = [bits(await client.post("/predict", **files_of([index])))[0] for index in range(LARGEST)]
            await until_checked(client, LARGEST)
            assert await value(client, "foldserve_degraded", model="tiny", version="1") == 0
            assert (await client.get("/readyz")).json() == {"status": "ready"}
            engine.twist = flip_in_crowds
            wrong = await crowd_of(client, engine, classifier)
            await until_checked(client, LARGEST + 9)
            await assert_degraded_and_said_so(client)
            caught = await checks(client, "live answer wrong"), await checks(client, "reference unstable")
            engine.sizes.clear()
            right = await crowd_of(client, engine, classifier)
            return lone, wrong, caught, right, set(engine.sizes), classifier.runner.reference

    lone, wrong, caught, right, sizes, reference = asyncio.run(scenario())

    assert wrong != lone, "the fault reached an answer"
    assert caught[0] >= 1
    assert caught[1] == 0
    assert (right, sizes) == (lone, {reference.batch_size})
    assert "tiny is degraded" in caplog.text
    assert "live answer wrong" in caplog.text


async def crowd_of(client, engine, classifier) -> list[list[int]]:
    """Return the answers to one image each for LARGEST slots, which all wait while the only lane is busy."""
    engine.close_gate()
    busy = asyncio.create_task(client.post("/predict", **files_of([LARGEST])))
    await until(engine.entered.is_set, "the lane is busy")
    crowd = asyncio.create_task(client.post("/predict", **files_of(range(LARGEST))))
    await until(lambda: classifier._batcher.depth == LARGEST, "the crowd waits together")
    engine.gate.set()
    await busy
    return bits(await crowd)


@pytest.mark.parametrize("fault, verdict", [(Once, "live answer wrong"), (Drift, "reference unstable")])
def test_a_third_run_decides_which_of_two_was_wrong(models, fault, verdict):
    engines = Engines()

    async def scenario():
        async with running(Settings(models=models, **WATCHED), engines) as client:
            engines.opened[0].twist = fault()
            await client.post("/predict", **files_of([0]))
            await until_checked(client, 1)
            await assert_degraded_and_said_so(client)
            return {one: await checks(client, one) for one in ("agreed", "live answer wrong", "reference unstable")}

    assert asyncio.run(scenario()) == {"agreed": 0, "live answer wrong": 0, "reference unstable": 0} | {verdict: 1}


@pytest.mark.parametrize("fault, is_void", [(Once, False), (Drift, True)])
def test_a_reference_that_changes_its_bits_voids_the_certificate(models, fault, is_void):
    engines = Engines()

    async def scenario():
        async with running(Settings(models=models, **WATCHED), engines) as client:
            before = (await client.get("/info")).json()["models"]["tiny"]["certificate"]
            engines.opened[0].twist = fault()
            await client.post("/predict", **files_of([0]))
            await until_checked(client, 1)
            after = await client.post("/predict", **files_of([0]))
            receipt = await client.post("/predict", **files_of([0]) | {"params": {"receipt": True}})
            return before, after.headers["foldserve-certificate"], receipt.status_code

    before, after, status = asyncio.run(scenario())

    assert (after, status) == (("none", 400) if is_void else (before, 200))


def test_a_sound_engine_is_checked_and_never_degraded(models):
    async def scenario():
        async with running(Settings(models=models, **WATCHED), Engines()) as client:
            for index in range(5):
                await client.post("/predict", **files_of([index]))
                await until_checked(client, index + 1)
            return (await client.get("/readyz")).json(), await value(
                client, "foldserve_degraded", model="tiny", version="1"
            )

    assert asyncio.run(scenario()) == ({"status": "ready"}, 0)


@pytest.mark.parametrize("options", [{"spot_check_share": 0.0}, {"spot_check_share": 1.0, "mode": "off"}], ids=str)
def test_nothing_is_checked_where_nothing_was_asked_for_or_promised(models, options):
    engines = Engines()
    with serving(Settings(models=models, device="cpu", **options), engines) as ask:
        engines.opened[0].sizes.clear()
        ask("POST", "/predict", **files_of([0]))

    assert len(engines.opened[0].sizes) == 1
