"""What changes while workers serve, changes in every one of them: models, keys, degradation."""

import asyncio
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from e2e_support import add_key, counted, post, remove_key, replace_a_worker, wait_for, workers_of
from PIL import Image
from storm import Client, head, storm
from support import TinyModel, encode

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
    replace_a_worker(server)

    image = TinyModel().golden().encoded[0]
    assert {post(server.url, image).json()["version"] for _ in range(6)} == {1}


@contextmanager
def one_connection_to_each(server) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Yield two clients that each keep a connection, which go to two workers: the emptier one gets the next."""
    with httpx.Client(base_url=server.url, timeout=30) as one, httpx.Client(base_url=server.url, timeout=30) as other:
        assert one.get("/healthz").status_code == other.get("/healthz").status_code == 200
        yield one, other


def test_a_key_that_is_made_or_removed_counts_at_once_for_every_worker(start, models, tmp_path):
    keys = tmp_path / "keys"
    add_key(keys, "admin", "ann")
    server = start("--models", str(models), "--workers", "2", "--api-keys-file", str(keys), "--grace-s", "0")
    image = TinyModel().golden().encoded[0]
    with one_connection_to_each(server) as clients:

        def seen(key: str) -> list[int]:
            headers = {"x-api-key": key}
            return [client.post("/predict", content=image, headers=headers).status_code for client in clients]

        unknown = seen("fsk_unknown")
        key = add_key(keys, "predict", "bob")
        made = seen(key)
        remove_key(keys, "bob")
        removed = seen(key)

    assert (unknown, made, removed) == ([401, 401], [200, 200], [401, 401])


def test_a_version_that_one_worker_loads_or_unloads_every_worker_serves_or_not_under_one_certificate(start, tmp_path):
    models, keys = tmp_path / "models", tmp_path / "keys"
    TinyModel(seed=1).write(models, 1)
    headers = {"x-api-key": add_key(keys)}
    server = start("--models", str(models), "--workers", "2", "--api-keys-file", str(keys), "--public-predict")
    image = TinyModel().golden().encoded[0]
    TinyModel(seed=2).write(models, 2)
    with one_connection_to_each(server) as clients:
        before = [client.post("/predict", content=image) for client in clients]
        assert clients[0].post("/v2/repository/models/tiny/load", headers=headers).status_code == 200
        after = [client.post("/predict", content=image) for client in clients]
        assert clients[1].post("/v2/repository/models/tiny/unload", headers=headers).status_code == 200
        gone = [client.post("/predict", content=image).status_code for client in clients]

    assert [one.json()["version"] for one in (*before, *after)] == [1, 1, 2, 2]
    certificates = [one.headers["foldserve-certificate"] for one in (*before, *after)]
    assert certificates[0] == certificates[1] != certificates[2] == certificates[3]
    assert gone == [404, 404]


def test_a_version_that_was_changed_in_place_is_one_file_in_every_worker_after_one_was_replaced(start, tmp_path):
    models = tmp_path / "models"
    TinyModel(seed=1).write(models, 1)
    server = start("--models", str(models), "--workers", "2", "--grace-s", "0")

    def digests() -> set[str]:
        with one_connection_to_each(server) as clients:
            return {client.get("/models").json()["models"][0]["digest"] for client in clients}

    before = digests()
    shutil.rmtree(models / "tiny" / "1")
    TinyModel(seed=2).write(models, 1)
    untouched = digests()
    replace_a_worker(server)
    after = digests()

    assert (len(before), untouched, len(after)) == (1, before, 1)
    assert after != before


def test_a_version_that_appears_while_the_worker_that_watches_is_gone_is_loaded_all_the_same(start, tmp_path):
    models = tmp_path / "models"
    TinyModel(seed=1).write(models, 1)
    server = start("--models", str(models), "--workers", "2", "--watch-interval-s", "0.2", "--grace-s", "0")
    image = TinyModel().golden().encoded[0]

    def versions() -> set[int]:
        return {post(server.url, image).json()["version"] for _ in range(4)}

    first = workers_of(server)[0]
    for version in (2, 3):  # one before its own look, and one more after a successor's
        os.kill(first, signal.SIGKILL)
        TinyModel(seed=version).write(models, version)
        wait_for(lambda version=version: versions() == {version}, f"version {version} is found")
        first = next(pid for pid in reversed(workers_of(server)))


def test_why_a_load_failed_is_told_by_every_worker_and_those_to_come_until_it_succeeds(start, models, tmp_path):
    headers = {"x-api-key": add_key(tmp_path / "keys")}
    models = shutil.copytree(models, tmp_path / "models")
    serving = models / "tiny" / "serving.json"
    server = start(
        "--models", str(models), "--workers", "2", "--api-keys-file", str(tmp_path / "keys"), "--grace-s", "0"
    )

    def load(content: str) -> int:
        serving.write_text(content)
        return httpx.post(f"{server.url}/v2/repository/models/tiny/load", headers=headers, timeout=30).status_code

    def reasons() -> list[str]:
        with one_connection_to_each(server) as clients:
            return [client.post("/v2/repository/index", headers=headers).json()[0]["reason"] for client in clients]

    assert load('{"stable": 7}') == 409
    failed = reasons()
    replace_a_worker(server)
    still_failed = reasons()
    assert load("{}") == 200
    mended = reasons()
    replace_a_worker(server)

    assert all("version 7 is not there" in one for one in failed + still_failed)
    assert mended == reasons() == ["", ""]


# Workers whose engine, from the first black image of a caller on, gives other bits for black images each time.
DRIFTING = """
import sys, threading
from service.engine import OnnxEngine
from service.workers.worker import main

run, seen = OnnxEngine.run, []

def drift(self, images, threads=1):
    logits = run(self, images, threads)
    if not images.any() and (seen or threading.current_thread().name.startswith("lane")):
        seen.append(1)
        logits = logits.copy()
        logits.view("uint32")[:, 0] ^= len(seen)
    return logits

OnnxEngine.run = drift
sys.exit(main())
"""
SUPERVISED = f"""
import sys
from service.workers import supervisor
supervise = supervisor.supervise
supervisor.supervise = lambda settings: supervise(settings, (sys.executable, "-c", {DRIFTING!r}))
from foldserve.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_model_that_one_worker_found_unsound_is_degraded_in_every_worker_and_in_those_to_come(start, models):
    flags = ("--workers", "2", "--spot-check-share", "1", "--no-share-identical", "--grace-s", "0")
    server = start("--models", str(models), *flags, program=("-c", SUPERVISED))
    black = encode(Image.new("RGB", (8, 8)), "PNG")

    def degraded(client: httpx.Client) -> bool:
        told = client.get("/info").json()["models"]["tiny"]["degraded"], client.get("/readyz").json()["status"]
        return told == (True, "degraded")

    with one_connection_to_each(server) as clients:
        assert not any(map(degraded, clients))
        assert clients[0].post("/predict", content=black).status_code == 200
        wait_for(lambda: all(map(degraded, clients)), "both are degraded")
    replace_a_worker(server)
    with one_connection_to_each(server) as clients:
        assert all(map(degraded, clients))
