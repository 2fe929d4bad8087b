"""The short way of /predict answers as the long one does, and our own server tells it what it needs to know."""

import asyncio
import re

import pytest
from http_support import listening, request_of
from PIL import Image
from support import Engines, assert_problem, encode, random_pixels, serving, until

from service.config import Settings
from service.routes.shortcut import short_query
from service.security import make_key, write_keys

FILES = [encode(Image.fromarray(one), "PNG") for one in random_pixels(4, seed=61)]
ITS_OWN = {"x-request-id", "date"}


def scope_of(query: str, method: str = "POST", path: str = "/predict") -> dict:
    return {"type": "http", "path": path, "method": method, "query_string": query.encode()}


@pytest.mark.parametrize("query", ["", "top_k=2", "model=tiny&logits=true", "receipt=true", "version=1"])
@pytest.mark.parametrize("content", [FILES[0], b"no image", b""], ids=["image", "no-image", "empty"])
def test_both_ways_give_one_answer(ask, query, content):
    # Starlette overlooks an empty parameter, which the short way leaves to it
    assert short_query(scope_of(query)) is not None
    assert short_query(scope_of(query + "&")) is None
    short, long = (ask("POST", f"/predict?{one}", content=content) for one in (query, query + "&"))

    assert (short.status_code, short.content) == (long.status_code, long.content)
    assert {**short.headers, **dict.fromkeys(ITS_OWN)} == {**long.headers, **dict.fromkeys(ITS_OWN)}


@pytest.mark.parametrize(
    ("query", "explanation"),
    [
        ("topk=2", "query parameter topk: it is not known here (did you mean top_k?)"),
        ("top_k=many", "query parameter top_k: Input should be a valid integer"),
        ("top_k=0", "query parameter top_k: Input should be greater than or equal to 1"),
        ("version=", "query parameter version: Input should be a valid integer"),
        ("logits=%ff", "query parameter logits: Input should be a valid boolean"),
    ],
)
def test_a_query_that_needs_an_explanation_goes_the_long_way_and_gets_it(ask, query, explanation):
    assert short_query(scope_of(query)) is None
    answer = ask("POST", f"/predict?{query}", content=FILES[0])
    assert assert_problem(answer, 400, "malformed-request")["detail"].startswith(explanation)


def test_a_parameter_given_twice_goes_the_long_way_where_the_last_one_counts(ask):
    assert short_query(scope_of("top_k=1&top_k=2")) is None
    assert len(ask("POST", "/predict?top_k=1&top_k=2", content=FILES[0]).json()["predictions"][0]["top"]) == 2


@pytest.mark.parametrize(("key", "status"), [("none", 401), ("wrong", 401), ("right", 200)])
def test_keys_origins_and_request_ids_mean_the_same_on_both_ways(models, tmp_path, key, status):
    right, stored = make_key("predict", "ann")
    write_keys(tmp_path / "keys", [stored])
    given = {
        "none": {},
        "wrong": {"authorization": f"Bearer {right[:-1]}"},
        "right": {"authorization": f"Bearer {right}"},
    }
    headers = {"origin": "https://other.example", "x-request-id": "mine", **given[key]}
    settings = Settings(models=models, device="cpu", api_keys_file=tmp_path / "keys", cors_origins=headers["origin"])
    with serving(settings) as asked:
        short, long = (asked("POST", f"/predict{end}", content=FILES[0], headers=headers) for end in ("", "?&"))

    assert short.status_code == status
    assert (long.status_code, long.content) == (short.status_code, short.content)
    assert {**short.headers, "date": ""} == {**long.headers, "date": ""}
    assert short.headers["x-request-id"] == headers["x-request-id"]
    assert short.headers["access-control-allow-origin"] == headers["origin"]


def test_an_engine_that_fails_is_one_500_on_both_ways(models):
    engines = Engines()
    with serving(Settings(models=models, device="cpu", spot_check_share=0), engines) as asked:
        engines.opened[0].twist = lambda images, logits: logits * float("nan")
        short, long = (asked("POST", f"/predict{end}", content=FILES[0]) for end in ("", "?&"))

    assert short.status_code == 500
    assert (long.status_code, long.content) == (short.status_code, short.content)


def test_a_long_query_goes_the_long_way_and_is_not_kept():
    assert short_query(scope_of("model=" + "a" * 190)) is not None
    assert short_query(scope_of("model=" + "a" * 300)) is None


def test_other_methods_and_paths_go_the_long_way(ask):
    assert short_query(scope_of("", method="GET")) is None
    assert short_query(scope_of("", path="/verify")) is None
    assert_problem(ask("GET", "/predict"), 405, "method-not-allowed")


@pytest.mark.parametrize("size", [1_000, 100_000, 4_000_000])
def test_a_caller_who_hangs_up_leaves_the_queue_at_once_and_is_counted(models, size):
    engines = Engines()

    async def scenario():
        async with listening(models, engines, max_batch_size=1) as (address, service):
            engine, batcher = engines.opened[0], service.classifier()._batcher
            engine.close_gate()
            _, busy = await asyncio.open_connection(*address)
            busy.write(request_of(FILES[0]))
            await until(engine.entered.is_set, "the lane is busy")
            _, leaver = await asyncio.open_connection(*address)
            leaver.write(request_of(FILES[1].ljust(size, b"\0")))  # what follows a PNG's end is no part of it
            await until(lambda: batcher.depth == 1, "the second waits")
            leaver.close()
            await until(lambda: batcher.admitted == 1, "the service knows that he has gone")
            engine.gate.set()
            await until(lambda: batcher.admitted == 0, "the first is answered")
            busy.close()
            return list(engine.sizes), service.metrics.exposition().decode()

    sizes, metrics = asyncio.run(asyncio.wait_for(scenario(), 60))

    assert sizes == [1]
    assert re.search(r'dropped_total\{model="tiny",reason="cancelled",version="1"\} 1\.0', metrics)
    assert re.search(r'http_requests_total\{code="499",reason="[\w-]+",route="/predict"\} 1\.0', metrics)


def test_requests_that_come_in_one_piece_each_get_the_answer_to_their_own_body(models):
    async def scenario():
        async with listening(models, Engines()) as (address, _):
            together = await _answers(address, [request_of(one, "?logits=true") for one in FILES])
            alone = [(await _answers(address, [request_of(one, "?logits=true")]))[0] for one in FILES]
            return together, alone

    together, alone = asyncio.run(asyncio.wait_for(scenario(), 60))

    assert together == alone
    assert len(set(alone)) == len(FILES)


async def _answers(address, requests: list[bytes]) -> list[bytes]:
    """Send requests in one piece over one connection; return the bodies of their answers."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"".join(requests))
    bodies = []
    for _ in requests:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length
        bodies.append(await reader.readexactly(int(length[1])))
    writer.close()
    return bodies


def test_a_body_that_comes_in_pieces_is_read_to_its_end(models):
    async def scenario():
        async with listening(models, Engines()) as (address, _):
            reader, writer = await asyncio.open_connection(*address)
            whole = request_of(FILES[0]).replace(b"\r\n", b"\r\nExpect: 100-continue\r\n", 1)
            writer.write(whole[:-20])
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")  # the body is being read
            writer.write(whole[-20:])
            head = await reader.readuntil(b"\r\n\r\n")
            writer.close()
            return head

    assert asyncio.run(asyncio.wait_for(scenario(), 60)).startswith(b"HTTP/1.1 200")
