"""A watched repository: what is whole is loaded, what goes is unloaded, what is being written is left alone."""

import asyncio
import shutil

import numpy as np
from reload_support import ask, assert_own_answer, run, service_on, tiny
from support import TinyModel, until


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
