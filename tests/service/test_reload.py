"""Loading, swapping and unloading while requests come: none is lost, each is answered by the version it says."""

import asyncio
import json
import shutil
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
from broken_models import mix_images, write_broken
from PIL import Image
from support import Engines, TinyModel, assert_problem, encode, random_pixels, running, until

from service.config import Settings
from service.errors import LoadFailed, ModelNotFound
from service.rollout import Rollout

PIXELS = random_pixels(3, seed=61)
FILES = [encode(Image.fromarray(one), "PNG") for one in PIXELS]


def tiny(version: int) -> TinyModel:
    return TinyModel(seed=version)


@pytest.fixture
def repository(tmp_path):
    """A repository of our own with version 1 of a tiny model; the seed of each version is its number."""
    tiny(1).write(tmp_path, 1)
    return tmp_path


@asynccontextmanager
async def service_on(repository, engines=None, **options):
    settings = Settings(models=repository, **{"device": "cpu", "lanes": 1, "spot_check_share": 0.0, **options})
    async with running(settings, engines or Engines()) as client:
        yield client, client._transport.app.state.service


async def ask(client, index: int = 0, **options):
    return await client.post("/predict?logits=true", content=FILES[index], **options)


def assert_own_answer(response, index: int = 0) -> int:
    """Check that the answer is that of the version which it names; return the version."""
    assert response.status_code == 200, response.text
    body = response.json()
    wanted = tiny(body["version"]).logits(PIXELS[index][np.newaxis])[0]
    assert body["predictions"][0]["logits"] == pytest.approx(wanted, abs=1e-3)
    return body["version"]


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 60))


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
                await service.load("tiny")
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
            await service.load("tiny", 1)
            go_on, half_sent = asyncio.Event(), asyncio.Event()

            async def body():
                yield FILES[0][:30]
                half_sent.set()
                await go_on.wait()
                yield FILES[0][30:]

            slow = asyncio.create_task(client.post("/predict?logits=true", content=body()))
            await half_sent.wait()
            await service.load("tiny", 2)
            between = assert_own_answer(await ask(client))
            assert service._roster._retiring, "the old version waits for the one who holds it"
            go_on.set()
            held = assert_own_answer(await slow)
            await until(lambda: not service._roster._retiring, "the old version is drained")
            return between, held

    assert run(scenario()) == (2, 1)


@pytest.mark.parametrize("fault", ["damaged", "mixing", "golden", "serving.json"])
def test_a_load_that_fails_keeps_the_old_version_and_says_why(repository, fault):
    async def scenario():
        async with service_on(repository) as (client, service):
            words = break_version_two(repository, fault)
            with pytest.raises(LoadFailed, match=words) as failed:
                await service.load("tiny")
            assert "version 1 is served still" in str(failed.value)
            reasons = {entry.version: (entry.is_ready, entry.reason) for entry in service.index()}
            assert reasons[1] == (True, "")
            if 2 in reasons:
                assert not reasons[2][0]
                assert reasons[2][1] in str(failed.value)
            return assert_own_answer(await ask(client))

    assert run(scenario()) == 1


def break_version_two(repository, fault: str) -> str:
    """Write a version 2, or a plan, that cannot be served; return what the refusal must speak of."""
    if fault == "serving.json":
        (repository / "tiny" / "serving.json").write_text('{"stable": 7}')
        return "version 7 is not there"
    if fault == "mixing":
        shutil.move(write_broken(repository / "aside", mix_images, tiny(2)), repository / "tiny" / "2")
        return "norm1"
    folder = tiny(2).write(repository, 2)
    if fault == "damaged":
        (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:100])
        return "not a sound ONNX file"
    shutil.copy(repository / "tiny" / "1" / "golden.npz", folder / "golden.npz")
    return "golden image"


def test_a_load_that_fails_at_its_second_version_leaves_nothing_of_its_first(repository):
    async def scenario():
        async with service_on(repository) as (client, service):
            tiny(2).write(repository, 2)
            (tiny(3).write(repository, 3) / "golden.npz").unlink()
            before = threading.active_count()
            with pytest.raises(LoadFailed, match=r"golden\.npz is missing"):
                await service.load("tiny", rollout=Rollout(stable=2, canary=3, canary_share=0.5))
            names = [thread.name for thread in threading.enumerate()[before:]]
            return assert_own_answer(await ask(client)), names, service.metrics.exposition().decode()

    version, threads_left, metrics = run(scenario())

    assert version == 1
    assert "spot-check" not in threads_left
    assert metrics.count("foldserve_model_info{") == 1


def test_after_a_failed_load_a_mended_version_can_be_loaded_and_the_reason_goes(repository):
    async def scenario():
        async with service_on(repository) as (client, service):
            break_version_two(repository, "damaged")
            with pytest.raises(LoadFailed):
                await service.load("tiny")
            shutil.rmtree(repository / "tiny" / "2")
            tiny(2).write(repository, 2)
            await service.load("tiny")
            assert [(entry.version, entry.is_ready, entry.reason) for entry in service.index()] == [
                (1, False, "not loaded"),
                (2, True, ""),
            ]
            return assert_own_answer(await ask(client))

    assert run(scenario()) == 2


def test_a_version_that_was_written_anew_in_place_is_loaded_anew_and_an_untouched_one_is_not(repository):
    engines = Engines()

    async def scenario():
        async with service_on(repository, engines) as (client, service):
            await service.load("tiny")
            assert len(engines.opened) == 1, "nothing had changed"
            shutil.rmtree(repository / "tiny" / "1")
            TinyModel(seed=9).write(repository, 1)
            await service.load("tiny")
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
            await service.load("tiny", 1, Rollout(canary=2, canary_share=0.5))

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
            await service.load("tiny", rollout=Rollout(also=(1,)))
            parts = {"data": {"receipt": receipt}, "files": {"file": ("x.png", FILES[0])}}
            kept = await client.post("/verify", **parts)
            await service.load("tiny")
            return kept, await client.post("/verify", **parts)

    kept, gone = run(scenario())

    assert kept.json()["same_bits"] is True
    assert_problem(gone, 404, "model-not-found")


def test_an_unloaded_model_is_not_found_and_can_be_loaded_again(repository):
    async def scenario():
        async with service_on(repository) as (client, service):
            await service.unload("tiny")
            assert_problem(await ask(client), 404, "model-not-found")
            assert (await client.get("/readyz")).status_code == 200
            assert [(entry.version, entry.is_ready) for entry in service.index()] == [(1, False)]
            with pytest.raises(ModelNotFound):
                await service.unload("tiny")
            for name in ("nobody", "../tiny", "", "a/b"):
                with pytest.raises(ModelNotFound):
                    await service.load(name)
            await service.load("tiny")
            return assert_own_answer(await ask(client))

    assert run(scenario()) == 1


def test_a_model_that_appears_or_changes_is_loaded_when_it_is_whole_and_one_that_goes_is_unloaded(repository):
    async def scenario():
        async with service_on(repository, watch_interval_s=0.02) as (client, service):
            tiny(2).write(repository / "aside", 2)
            shutil.move(repository / "aside" / "tiny" / "2", repository / "tiny" / "2")
            await until(lambda: service.classifier("tiny").model.version == 2, "the new version is found")
            TinyModel(name="other").write(repository)
            await until(lambda: len(service.models()) == 2, "the new model is found")
            shutil.rmtree(repository / "other")
            await until(lambda: len(service.models()) == 1, "it went")
            (repository / "tiny" / "serving.json").write_text('{"stable": 1}')
            await until(lambda: service.classifier("tiny").model.version == 1, "the plan is followed")
            return assert_own_answer(await ask(client))

    assert run(scenario()) == 1


def test_a_version_that_is_written_slowly_is_never_served_in_part_and_loads_once_whole(repository):
    """Whatever moment a look falls on, what answers is whole: a half is refused by its golden images or its reader."""
    whole = tiny(2).write(repository / "aside", 2)

    async def scenario():
        async with service_on(repository, watch_interval_s=0.01) as (client, service):
            folder = repository / "tiny" / "2"
            folder.mkdir()
            for name in ("model.onnx", "golden.npz"):
                content = (whole / name).read_bytes()
                for end in np.linspace(0, len(content), 5).astype(int):
                    (folder / name).write_bytes(content[:end])
                    await asyncio.sleep(0.03)  # long enough for looks to fall in between
                    assert_own_answer(await ask(client))
            await until(lambda: service.classifier("tiny").model.version == 2, "the whole version is loaded")
            return assert_own_answer(await ask(client))

    assert run(scenario()) == 2
