"""Identical images share a run, a cached answer and an entity tag: under a certificate, and where no run is meant."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from PIL import Image
from support import Engines, assert_problem, encode, photo, random_pixels, running, until

from service.config import Settings

PIXELS = random_pixels(4, seed=23)
FILES = [encode(Image.fromarray(one), "PNG") for one in PIXELS]
SAME_PIXELS = encode(Image.fromarray(PIXELS[1]), "BMP")  # another file, the same image
UNCERTIFIED = [{"mode": "off"}, {"share_identical": False}]


@asynccontextmanager
async def service_on(models, **options):
    """Yield a client, the engine and the service; nothing has run when they come."""
    engines = Engines()
    alone = {"device": "cpu", "lanes": 1, "spot_check_share": 0.0, "max_batch_size": 1}  # so that no run is padded
    settings = Settings(models=models, **{**alone, **options})
    async with running(settings, engines) as client:
        engines.opened[0].sizes.clear()
        yield client, engines.opened[0], client._transport.app.state.service


async def crowd(client, engine, service, contents) -> list:
    """Ask for all at once while the only lane is busy with FILES[0]."""
    engine.close_gate()
    busy = asyncio.create_task(client.post("/predict", content=FILES[0]))
    await until(engine.entered.is_set, "the lane is busy")
    asked = [asyncio.create_task(client.post("/predict", content=content)) for content in contents]
    batcher = service.classifier()._batcher
    shared = f'foldserve_shared_total{{model="tiny",version="1"}} {len(contents) - 1:.1f}'
    if service.classifier().shares:
        await until(lambda: shared in service.metrics.exposition().decode(), "all but one have joined")
    else:
        await until(lambda: batcher.depth == len(contents), "all wait")
    engine.gate.set()
    await busy
    return await asyncio.gather(*asked)


def run_with(models, contents, **options):
    async def scenario():
        async with service_on(models, **options) as (client, engine, service):
            answers = await crowd(client, engine, service, contents)
            return answers, sum(engine.sizes[1:]), service.metrics.exposition().decode()

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def test_identical_images_in_flight_run_once_whatever_file_they_came_in(models):
    answers, rows, metrics = run_with(models, [FILES[1], SAME_PIXELS, FILES[1]])

    assert rows == 1
    assert len({answer.content for answer in answers}) == 1
    assert 'foldserve_shared_total{model="tiny",version="1"} 2.0' in metrics


@pytest.mark.parametrize("options", UNCERTIFIED, ids=str)
def test_without_a_certificate_or_where_it_is_switched_off_every_image_runs(models, options):
    answers, rows, metrics = run_with(models, [FILES[1]] * 3, **options)

    assert rows >= 3
    assert not any("etag" in answer.headers for answer in answers)
    assert 'foldserve_shared_total{model="tiny",version="1"} 0.0' in metrics


def ask_in_turn(models, contents, **options) -> tuple[list, int, str]:
    async def scenario():
        async with service_on(models, **options) as (client, engine, service):
            answers = [await client.post("/predict?logits=true", content=content) for content in contents]
            return answers, len(engine.sizes), service.metrics.exposition().decode()

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def test_an_image_that_comes_again_is_answered_from_the_cache_with_the_same_bytes(models):
    answers, runs, metrics = ask_in_turn(models, [FILES[1], SAME_PIXELS, FILES[1]], cache_answers=2)

    assert runs == 1
    assert len({answer.content for answer in answers}) == 1
    assert 'foldserve_cache_hits_total{model="tiny",version="1"} 2.0' in metrics
    assert 'foldserve_confidence_count{model="tiny",version="1"} 3.0' in metrics, "answers from the cache are answers"


def test_the_cache_lets_the_one_go_that_was_not_used_for_longest(models):
    _, runs, _ = ask_in_turn(models, [FILES[1], FILES[2], FILES[1], FILES[3], FILES[1], FILES[2]], cache_answers=2)

    assert runs == 4  # 1, 2, 3, and 2 again


@pytest.mark.parametrize("options", [{}, *({**one, "cache_answers": 9} for one in UNCERTIFIED)], ids=str)
def test_nothing_is_cached_unless_asked_for_and_certified(models, options):
    _, runs, _ = ask_in_turn(models, [FILES[1]] * 3, **options)

    assert runs == 3


def test_a_replay_runs_though_the_answer_is_in_the_cache(models):
    async def scenario():
        async with service_on(models, cache_answers=9) as (client, engine, _):
            answer = await client.post("/predict?receipt=true", content=FILES[1])
            receipt = json.dumps(answer.json()["predictions"][0]["receipt"])
            before = len(engine.sizes)
            verified = await client.post("/verify", data={"receipt": receipt}, files={"file": ("x.png", FILES[1])})
            return verified.json()["same_bits"], len(engine.sizes) - before

    assert asyncio.run(asyncio.wait_for(scenario(), 30)) == (True, 1)


def test_once_a_spot_check_has_failed_nothing_is_shared_or_taken_from_the_cache(models):
    async def scenario():
        async with service_on(models, cache_answers=9) as (client, engine, service):
            first = await client.post("/predict", content=FILES[1])
            service.classifier().runner.degrade()
            again = await client.post("/predict", content=FILES[1])
            return first.headers, again.headers, len(engine.sizes)

    first, again, runs = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert "etag" in first
    assert "etag" not in again
    assert runs == 2


def test_an_entity_tag_names_the_whole_answer(ask):
    tags = [
        ask("POST", "/predict", content=FILES[1]).headers["etag"],
        ask("POST", "/predict", content=SAME_PIXELS).headers["etag"],
        ask("POST", "/predict?top_k=1", content=FILES[1]).headers["etag"],
        ask("POST", "/predict", content=FILES[2]).headers["etag"],
    ]

    assert tags[0] == tags[1]
    assert len(set(tags)) == 3


def test_a_caller_who_holds_the_answer_is_told_so_and_not_sent_it_again(ask):
    tag = ask("POST", "/predict", content=FILES[1]).headers["etag"]
    for held in (tag, f'"other", {tag}', f"W/{tag}"):
        refused = ask("POST", "/predict", content=FILES[1], headers={"if-none-match": held})
        assert_problem(refused, 412, "answer-unchanged")  # 304 answers GET alone (RFC 9110, 13.1.2)

    assert ask("POST", "/predict", content=FILES[2], headers={"if-none-match": tag}).status_code == 200


def test_an_answer_with_an_error_in_it_has_no_entity_tag(ask):
    files = [("file", ("a.png", FILES[1])), ("file", ("b.png", b"no image"))]

    assert "etag" not in ask("POST", "/predict", files=files).headers


def test_pixels_in_decoding_are_bounded_over_all_requests(models):
    large = encode(photo(size=(100, 90)), "PNG")  # small ones are decoded where they are, one by one

    async def scenario():
        limits = {"max_image_pixels": 10_000, "max_pixels_in_flight": 10_000, "decode_threads": 4}
        async with service_on(models, **limits) as (client, _, service):
            room, lowest = service.classifier()._preparer.decoders.room, []
            give_back = room.give_back
            room.give_back = lambda pixels: (lowest.append(room.free), give_back(pixels))[1]
            answers = await asyncio.gather(*(client.post("/predict", content=large) for _ in range(12)))
            return [answer.status_code for answer in answers], min(lowest), room.free

    statuses, lowest, after = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert statuses == [200] * 12
    assert lowest == 1000  # one image of 9,000 pixels at a time
    assert after == 10_000


def test_an_answer_that_cannot_be_kept_fails_alone(models):
    async def scenario():
        async with service_on(models, cache_answers=8) as (client, _, service):
            cache, first = service.classifier()._cache, []
            keep = cache.keep

            def fail_once(digest, logits):
                if not first:
                    first.append(digest)
                    raise ZeroDivisionError("the cache broke")
                keep(digest, logits)

            cache.keep = fail_once
            files = [("file", (f"{index}.png", FILES[index])) for index in range(3)]
            answer = (await client.post("/predict", files=files)).json()
            await until(lambda: service.classifier()._batcher.admitted == 0, "nobody is let in any more")
            return ["error" in one for one in answer["predictions"]]

    assert sorted(asyncio.run(asyncio.wait_for(scenario(), 30))) == [False, False, True]
