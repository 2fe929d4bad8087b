"""What changes while workers serve, changes in every one of them: models, keys, degradation."""

import asyncio
import itertools
import json
import os
import signal
import time

import httpx
import numpy as np
import pytest
from e2e_support import add_key, counted, post, wait_for, workers_of
from storm import Client, head, storm
from support import TinyModel

pytestmark = pytest.mark.e2e


def test_reload_in_a_loop_under_load_loses_nothing_and_every_answer_has_a_version_that_was_served(start, tmp_path):
    models = tmp_path / "models"
    by_version = {version: TinyModel(seed=version) for version in (1, 2)}
    for version, model in by_version.items():
        model.write(models, version)
    keys = tmp_path / "keys"
    key = add_key(keys)
    server = start("--models", str(models), "--workers", "2", "--no-share-identical", "--api-keys-file", str(keys),
                   "--public-predict", "--grace-s", "0")  # fmt: skip
    image = by_version[1].golden().encoded[0]
    expected = {version: model.logits(model.golden().pixels[:1])[0] for version, model in by_version.items()}
    tolerance = max(model.golden().tolerance for model in by_version.values())
    answers: list[tuple[float, float, int]] = []
    loads: list[tuple[float, float, int]] = []
    stop = asyncio.Event()

    async def ask(client: Client, _: int) -> None:
        while not stop.is_set():
            started = time.monotonic()
            status, _, body = await client.send(lambda writer: write(writer, image))
            assert status == 200, body
            document = json.loads(body)
            logits = np.array(document["predictions"][0]["logits"])
            assert np.abs(logits - expected[document["version"]]).max() <= tolerance, "the version that it says"
            answers.append((started, time.monotonic(), document["version"]))

    async def write(writer: asyncio.StreamWriter, content: bytes) -> None:
        writer.write(head(len(content)).replace(b"/predict", b"/predict?logits=true") + content)

    async def reload(client: Client, number: int) -> None:
        if number:
            await ask(client, number)
            return
        async with httpx.AsyncClient(base_url=server.url, headers={"x-api-key": key}, timeout=60) as admin:
            for turn in range(6):
                version, started = 1 + turn % 2, time.monotonic()
                answer = await admin.post("/v2/repository/models/tiny/load", json={"parameters": {"version": version}})
                assert answer.status_code == 200, answer.text
                loads.append((started, time.monotonic(), version))
                await asyncio.sleep(0.2)
        stop.set()

    tally = asyncio.run(storm(server.url, 9, reload))

    assert set(tally.statuses) == {200}
    assert {version for _, _, version in answers} == {1, 2}
    for (_, loaded, version), (next_load, _, _) in itertools.pairwise(loads):
        between = {seen for asked, answered, seen in answers if loaded < asked and answered < next_load}
        assert between <= {version}, "once a load is answered, every worker serves it"
    assert counted(server.url, route="/predict", code="200") == len(answers)


def test_a_worker_that_is_replaced_serves_what_the_others_serve_not_what_the_disk_says(start, tmp_path):
    models = tmp_path / "models"
    TinyModel(seed=1).write(models, 1)
    server = start("--models", str(models), "--workers", "2", "--grace-s", "0")
    folder = TinyModel(seed=2).write(models, 2)
    (folder / "model.onnx").write_bytes(b"damaged")
    os.kill(workers_of(server)[0], signal.SIGKILL)
    wait_for(lambda: httpx.get(f"{server.url}/info").json()["workers"]["ready"] == 2, "the worker is replaced")

    image = TinyModel().golden().encoded[0]
    assert {post(server.url, image).json()["version"] for _ in range(6)} == {1}
