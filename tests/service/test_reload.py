"""Loading, swapping and unloading while requests come: none is lost, each is answered by the version it says."""

import asyncio
import json
import shutil

import pytest
from reload_support import FILES, PIXELS, ask, assert_own_answer, run, service_on, tiny
from support import Engines, TinyModel, assert_problem, until

from service.errors import ModelNotFound
from service.rollout import Rollout


def test_a_new_version_is_swapped_in_under_load_and_no_request_is_lost(repository):
    async def scenario():
        async with service_on(repository) as (client, service):
            done, versions = asyncio.Event(), []

            async def caller(index):
                while not done.is_set():
                    versions.append(assert_own_answer(await ask(client, index), index))

            callers = [asyncio.create_task(caller(index)) for index in range(len(FILES))]
            for version in (2, 3, 4):
                tiny(version).write(repository, version)
                await service.changes.load("tiny")
                seen = len(versions)
                await until(lambda seen=seen: len(versions) > seen + 6, "the new version answers")
            done.set()
            await asyncio.gather(*callers)
            await until(lambda: not service._roster._retiring, "the old ones are drained")
            return versions

    assert set(run(scenario())) == {1, 2, 3, 4}


def test_a_request_that_holds_the_old_version_is_answered_by_it(repository):
    tiny(2).write(repository, 2)
    engines = Engines()

    async def scenario():
        async with service_on(repository, engines) as (client, service):
            await service.changes.load("tiny", 1)
            go_on, half_sent = asyncio.Event(), asyncio.Event()

            async def body():
                yield FILES[0][:30]
                half_sent.set()
                await go_on.wait()
                yield FILES[0][30:]

            slow = asyncio.create_task(client.post("/predict?logits=true", content=body()))
            await half_sent.wait()
            await service.changes.load("tiny", 2)
            between = assert_own_answer(await ask(client))
            assert service._roster._retiring, "the old version waits for the one who holds it"
            go_on.set()
            held = assert_own_answer(await slow)
            await until(lambda: not service._roster._retiring, "the old version is drained")
            return between, held

    assert run(scenario()) == (2, 1)


def test_a_version_that_was_written_anew_in_place_is_loaded_anew_and_an_untouched_one_is_not(repository):
    engines = Engines()

    async def scenario():
        async with service_on(repository, engines) as (client, service):
            await service.changes.load("tiny")
            assert len(engines.opened) == 1, "nothing had changed"
            shutil.rmtree(repository / "tiny" / "1")
            TinyModel(seed=9).write(repository, 1)
            await service.changes.load("tiny")
            await until(lambda: not service._roster._retiring, "the old one is drained")
            answer = (await ask(client)).json()
            return answer, service.metrics.exposition().decode(), service.classifier().model.digest

    answer, metrics, digest = run(scenario())

    wanted = TinyModel(seed=9).logits(PIXELS[:1])[0]
    assert answer["predictions"][0]["logits"] == pytest.approx(wanted, abs=1e-3)
    assert f'digest="{digest}"' in metrics
    assert metrics.count("foldserve_model_info{") == 1
    assert 'foldserve_pending_request_count{model="tiny",version="1"} 0.0' in metrics


def test_every_loaded_version_answers_who_asks_for_it_and_no_other_does(repository):
    for version in (2, 3, 4):
        tiny(version).write(repository, version)
    (repository / "tiny" / "serving.json").write_text('{"stable": 3, "canary": 4, "also": [1]}')

    async def scenario():
        async with service_on(repository) as (client, _):
            for version in (1, 3, 4):
                answer = await client.post(f"/predict?logits=true&version={version}", content=FILES[0])
                assert assert_own_answer(answer) == version
            assert assert_own_answer(await ask(client)) == 3
            problem = await client.post("/predict?version=2", content=FILES[0])
            assert "version 1, 3, 4, not 2" in assert_problem(problem, 404, "model-not-found")["detail"]
            canary = (await client.get("/models/tiny?version=4")).json()
            assert (canary["version"], canary["certificate"]["version"]) == (4, 4)
            assert (await client.get("/models/tiny?version=2")).status_code == 404
            return (await client.get("/models/tiny")).json()["serving"]

    assert run(scenario()) == {"stable": 3, "canary": 4, "canary_share": 0.0, "shadow": None, "loaded": [1, 3, 4]}


def test_a_canary_answers_its_share_and_one_request_id_always_gets_the_same(repository):
    tiny(2).write(repository, 2)

    async def scenario():
        async with service_on(repository) as (client, service):
            await service.changes.load("tiny", 1, Rollout(canary=2, canary_share=0.5))

            async def answered(name: str) -> int:
                return assert_own_answer(await ask(client, headers={"x-request-id": name}))

            first = [await answered(f"caller-{index}") for index in range(40)]
            again = [await answered(f"caller-{index}") for index in range(40)]
            return first, again, service.metrics.exposition().decode()

    first, again, metrics = run(scenario())

    assert first == again
    assert set(first) == {1, 2}
    for version in (1, 2):
        line = f'foldserve_images_total{{model="tiny",outcome="ok",version="{version}"}} {2 * first.count(version)}.0'
        assert line in metrics


def test_a_receipt_of_a_version_that_is_gone_is_not_found(repository):
    async def scenario():
        async with service_on(repository) as (client, service):
            answer = (await client.post("/predict?receipt=true", content=FILES[0])).json()
            receipt = json.dumps(answer["predictions"][0]["receipt"])
            tiny(2).write(repository, 2)
            await service.changes.load("tiny", rollout=Rollout(also=(1,)))
            parts = {"data": {"receipt": receipt}, "files": {"file": ("x.png", FILES[0])}}
            kept = await client.post("/verify", **parts)
            await service.changes.load("tiny")
            return kept, await client.post("/verify", **parts)

    kept, gone = run(scenario())

    assert kept.json()["same_bits"] is True
    assert_problem(gone, 404, "model-not-found")


def test_an_unloaded_model_is_not_found_and_can_be_loaded_again(repository):
    async def scenario():
        async with service_on(repository) as (client, service):
            await service.changes.unload("tiny")
            assert_problem(await ask(client), 404, "model-not-found")
            assert (await client.get("/readyz")).status_code == 200
            assert [(entry.version, entry.is_ready) for entry in service.index()] == [(1, False)]
            with pytest.raises(ModelNotFound):
                await service.changes.unload("tiny")
            for name in ("nobody", "../tiny", "", "a/b"):
                with pytest.raises(ModelNotFound):
                    await service.changes.load(name)
            await service.changes.load("tiny")
            return assert_own_answer(await ask(client))

    assert run(scenario()) == 1
