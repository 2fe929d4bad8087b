"""A load that fails changes nothing: what was served is served still, and the reason is told until it is mended."""

import shutil
import threading

import pytest
from broken_models import mix_images, write_broken
from reload_support import ask, assert_own_answer, run, service_on, tiny

from service.errors import LoadFailed
from service.rollout import Rollout


@pytest.mark.parametrize("fault", ["damaged", "mixing", "golden", "serving.json"])
def test_a_load_that_fails_keeps_the_old_version_and_says_why(repository, fault):
    async def scenario():
        async with service_on(repository) as (client, service):
            words = break_version_two(repository, fault)
            with pytest.raises(LoadFailed, match=words) as failed:
                await service.changes.load("tiny")
            assert "version 1 is served still" in str(failed.value)
            told = [(entry.version, entry.is_ready) for entry in service.index()]
            assert told == [(1, True), (2, False)][: 1 if fault == "serving.json" else 2]
            (reason,) = {entry.reason for entry in service.index()}
            assert reason.removeprefix("the last load failed: ") in str(failed.value)
            assert reason.startswith("the last load failed: "), "also where every version is loaded"
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
                await service.changes.load("tiny", rollout=Rollout(stable=2, canary=3, canary_share=0.5))
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
                await service.changes.load("tiny")
            shutil.rmtree(repository / "tiny" / "2")
            tiny(2).write(repository, 2)
            await service.changes.load("tiny")
            assert [(entry.version, entry.is_ready, entry.reason) for entry in service.index()] == [
                (1, False, "not loaded"),
                (2, True, ""),
            ]
            return assert_own_answer(await ask(client))

    assert run(scenario()) == 2


def test_a_model_that_is_unloaded_after_a_failed_load_is_just_not_loaded(repository):
    async def scenario():
        async with service_on(repository) as (_, service):
            break_version_two(repository, "serving.json")
            with pytest.raises(LoadFailed):
                await service.changes.load("tiny")
            await service.changes.unload("tiny")
            return [entry.reason for entry in service.index()]

    assert run(scenario()) == ["not loaded"]
