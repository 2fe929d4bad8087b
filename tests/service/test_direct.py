"""A usual call that is answered past the app gets the answer of the app, however its bytes arrive."""

import asyncio
import gc
import logging
import re
import time

import pytest
from http_support import listening
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import Engines, encode, random_pixels, until

from service.app import create_app, direct_of
from service.config import Settings
from service.connection import Connection
from service.routes.calls import Call, Exchange
from service.routes.heads import KEPT, MOST_BYTES_KEPT, Head, Heads
from service.security import make_key, write_keys

FILES = [encode(Image.fromarray(one), "PNG") for one in random_pixels(5, seed=67)]
JPEG = encode(Image.fromarray(random_pixels(1, side=40)[0]), "JPEG")
LARGE = encode(Image.fromarray(random_pixels(1, side=90)[0]), "PNG")
THROUGH_THE_APP = "Origin: https://other.example\r\n"  # says nothing to a service without CORS, but to a layer of it


def request(content: bytes, query: str = "", *lines: str, method: str = "POST") -> bytes:
    given = "".join(f"{line}\r\n" for line in lines)
    head = f"{method} /predict{query} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n{given}\r\n"
    return head.encode() + content


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Read one answer: status, header fields by their names, body."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
    fields = dict(line.split(": ", 1) for line in lines if line)
    return int(first.split()[1]), fields, await reader.readexactly(int(fields["content-length"]))


async def ask(address, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(sent)
    try:
        return await asyncio.wait_for(answer(reader), 10)
    finally:
        writer.close()


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 60))


@pytest.fixture
def client_settings(models):
    return Settings(models=models, device="cpu")


BOTH = {
    "image": (request, FILES[0]),
    "put": (lambda one, *more: request(one, "", *more, method="PUT"), FILES[0]),
    "jpeg": (request, JPEG),
    "large": (request, LARGE),
    "no image": (request, b"no image"),
    "cut": (request, FILES[0][:-30]),
    "top_k": (lambda one, *more: request(one, "?top_k=2&logits=true", *more), FILES[0]),
    "receipt": (lambda one, *more: request(one, "?receipt=true", *more), FILES[0]),
    "version": (lambda one, *more: request(one, "?version=7", *more), FILES[0]),
    "model": (lambda one, *more: request(one, "?model=other", *more), FILES[0]),
    "in time": (lambda one, *more: request(one, "", "X-Request-Timeout-Ms: 5000", *more), FILES[0]),
    "priority": (lambda one, *more: request(one, "", "X-Request-Priority: high", *more), FILES[0]),
    "wrong priority": (lambda one, *more: request(one, "", "X-Request-Priority: now", *more), FILES[0]),
    "held": (lambda one, *more: request(one, "", 'If-None-Match: "other"', *more), FILES[0]),
    "close": (lambda one, *more: request(one, "", "Connection: close", *more), FILES[0]),
    "type": (lambda one, *more: request(one, "", "Content-Type: image/png; x=y", *more), FILES[0]),
    "fragment": (lambda one, *more: request(one, "?model=tiny#x", *more), FILES[0]),
    "wrong type": (lambda one, *more: request(one, "", "Content-Type: text/html", *more), FILES[0]),
}


@pytest.mark.parametrize("mode", ["strict", "off"])
@pytest.mark.parametrize("shares", [False, True], ids=["alone", "shared"])
def test_both_ways_give_one_answer(models, mode, shares):
    async def scenario():
        async with listening(models, Engines(), mode=mode, share_identical=shares) as (address, _):
            given = "X-Request-Id: mine"
            ways = (), (), (THROUGH_THE_APP.strip(),)  # by a new head, by a known one, through the app
            return [
                (name, [await ask(address, make(content, given, *way)) for way in ways])
                for name, (make, content) in BOTH.items()
            ]

    for name, (*direct, app) in run(scenario()):
        for one in direct:
            assert (one[0], one[2]) == (app[0], app[2]), name
            assert {**one[1], "date": ""} == {**app[1], "date": ""}, name


def test_the_entity_tag_of_an_answer_is_known_on_both_ways(models):
    async def scenario():
        async with listening(models, Engines(), share_identical=True) as (address, _):
            _, fields, _ = await ask(address, request(FILES[0]))
            held = f"If-None-Match: {fields['etag']}"
            return [(await ask(address, request(FILES[0], "", held, *more)))[0] for more in ((), ("Origin: x",))]

    assert run(scenario()) == [412, 412]


@pytest.mark.parametrize(
    ("key", "status"), [("none", 401), ("empty", 401), ("wrong", 401), ("admin", 403), ("right", 200)]
)
@pytest.mark.parametrize("field", ["Authorization: Bearer", "authorization: bearer", "X-API-Key:"])
def test_keys_mean_the_same_on_both_ways(models, tmp_path, key, status, field):
    (right, stored), (admin, other) = make_key("predict", "ann"), make_key("admin", "bob")
    write_keys(tmp_path / "keys", [stored, other])
    keys = {
        "none": [],
        "empty": [field],
        "wrong": [f"{field} {right[:-1]}"],
        "admin": [f"{field} {admin}"],
        "right": [f"{field} {right}"],
    }
    engines = Engines()

    async def scenario():
        async with listening(models, engines, api_keys_file=tmp_path / "keys") as (address, service):
            lines = ["X-Request-Id: mine", *keys[key]]
            asked = [await ask(address, request(FILES[0], "", *lines, *more)) for more in ((), ("Origin: x",))]
            return asked, service.metrics.exposition().decode()

    (direct, app), metrics = run(scenario())

    assert direct[0] == status
    assert (direct[0], direct[2], {**direct[1], "date": ""}) == (app[0], app[2], {**app[1], "date": ""})
    decoded = re.search(r'stage_duration_seconds_count\{model="tiny",stage="decode",version="1"\} (\d+)', metrics)
    assert decoded
    assert int(decoded[1]) == (2 if status == 200 else 0), "a caller without a key costs no decoding"


def test_an_engine_that_fails_is_one_500_on_both_ways(models):
    engines = Engines()

    async def scenario():
        async with listening(models, engines, spot_check_share=0) as (address, _):
            engines.opened[0].twist = lambda images, logits: logits * float("nan")
            return [await ask(address, request(FILES[0], "", *more)) for more in ((), ("Origin: x",))]

    direct, app = run(scenario())

    assert direct[0] == 500
    assert (direct[0], direct[2]) == (app[0], app[2])


def test_a_surprise_is_answered_counted_once_and_logged(models, caplog):
    async def scenario():
        async with listening(models, Engines()) as (address, service):
            service.classifier().metrics.outcome = None  # of what no code foresees
            answered = await ask(address, request(FILES[0], "", "X-Request-Id: mine"))
            return answered, service.metrics.exposition().decode()

    (status, fields, content), metrics = run(scenario())

    assert (status, fields["x-request-id"]) == (500, "mine")
    assert b"the service failed; its log says why" in content
    assert re.search(r'http_requests_total\{code="500",reason="internal",route="/predict"\} 1\.0', metrics)
    assert [one for one in caplog.records if one.levelno == logging.ERROR and one.exc_info]


STREAM = [
    request(FILES[0].ljust(600, b"\0"), "?logits=true"),
    request(FILES[1].ljust(600, b"\0"), "?logits=true"),  # by the very same head
    request(b"\r\n\r\n" + FILES[2], "?logits=true"),
    request(FILES[3], "?logits=true", THROUGH_THE_APP.strip()),
    request(b"POST /predict HTTP/1.1\r\n\r\n", "?logits=true"),
    request(FILES[4].ljust(600, b"\0"), "?logits=true"),
    request(FILES[0], "?logits=true"),
]
ALL = b"".join(STREAM)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(1, len(ALL) - 1), max_size=12))
def test_however_the_bytes_are_cut_each_request_gets_its_own_answer_in_its_turn(stream, cuts):
    pieces = [ALL[start:end] for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(ALL)], strict=True)]

    assert stream(pieces) == stream.alone


@pytest.fixture(scope="module")
def stream(models):
    """Return what sends pieces over one connection and gives statuses and bodies; `alone`: each request by itself."""
    with asyncio.Runner() as runner:
        server = listening(models, Engines(), mode="off")
        address, _ = runner.run(server.__aenter__())

        async def send(pieces: list[bytes]) -> list[tuple[int, bytes]]:
            reader, writer = await asyncio.open_connection(*address)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.001)  # so that the other side gets them apart
            got = [await asyncio.wait_for(answer(reader), 10) for _ in STREAM]
            writer.close()
            return [(status, content) for status, _, content in got]

        def over_one_connection(pieces: list[bytes]) -> list[tuple[int, bytes]]:
            return runner.run(send(pieces))

        alone = [runner.run(ask(address, one)) for one in STREAM]
        over_one_connection.alone = [(status, content) for status, _, content in alone]
        yield over_one_connection
        runner.run(server.__aexit__(None, None, None))


def test_a_head_that_came_before_is_known_again_and_its_body_is_a_new_one(models):
    async def scenario():
        async with listening(models, Engines()) as (address, _):
            reader, writer = await asyncio.open_connection(*address)
            bodies = []
            for content in (*FILES, *FILES):
                writer.write(request(content.ljust(600, b"\0"), "?logits=true"))
                bodies.append((await answer(reader))[2])
            writer.close()
            alone = [(await ask(address, request(one, "?logits=true", "Origin: x")))[2] for one in FILES]
            return bodies, alone

    bodies, alone = run(scenario())

    assert bodies == [*alone, *alone]


def test_calls_that_arrive_together_get_each_its_own_answer(models):
    async def scenario():
        async with listening(models, Engines(), lanes=2) as (address, _):
            alone = [(await ask(address, request(one, "?logits=true")))[2] for one in FILES]
            callers = [await asyncio.open_connection(*address) for _ in range(20)]
            for number, (_, writer) in enumerate(callers):
                writer.write(request(FILES[number % len(FILES)], "?logits=true"))
            together = [(await answer(reader))[2] for reader, _ in callers]
            for _, writer in callers:
                writer.close()
            return together, alone

    together, alone = run(scenario())

    assert together == 4 * alone
    assert len(set(alone)) == len(FILES)


def test_a_known_call_waits_for_the_answer_to_the_one_before_it(models):
    slow = encode(Image.fromarray(random_pixels(1, seed=3)[0]), "BMP")  # is decoded by a thread
    requests = [request(one.ljust(4000, b"\0"), "?logits=true") for one in (FILES[0], slow, FILES[1])]

    async def scenario():
        async with listening(models, Engines()) as (address, _):
            alone = [(await ask(address, one))[2] for one in requests]
            reader, writer = await asyncio.open_connection(*address)
            got = []
            for _ in range(10):
                for one in requests:
                    writer.write(one)
                    await asyncio.sleep(0)
                got += [(await answer(reader))[2] for _ in requests]
            writer.close()
            return got, alone

    got, alone = run(scenario())

    assert got == 10 * alone
    assert len(set(alone)) == 3


def head_of(settings, *lines: str, target: bytes = b"/predict", method: bytes = b"POST") -> Head | None:
    fields = [line.split(": ", 1) for line in ("content-length: 9", *lines)]
    return Heads(settings).read(method, target, [(name.lower().encode(), value.encode()) for name, value in fields])


@pytest.mark.parametrize(
    "changed",
    [
        {"method": b"GET"},
        {"target": b"/verify"},
        {"target": b"/predict?topk=1"},
        {"target": b"/%70redict"},
        {"target": b"http://x/predict"},
        {"lines": ["expect: 100-continue"]},
        {"lines": ["origin: https://other.example"]},
        {"lines": ["transfer-encoding: chunked"]},
        {"lines": ["content-encoding: gzip"]},
        {"lines": ["content-type: application/json"]},
        {"lines": ["content-type: multipart/form-data; boundary=x"]},
        {"lines": ["x-request-priority: now"]},
        {"lines": ["x-request-timeout-ms: soon"]},
        {"lines": ["accept: */*", "accept: image/*"]},
    ],
    ids=str,
)
def test_what_another_has_a_word_to_say_of_goes_through_the_app(client_settings, changed):
    lines = changed.pop("lines", [])
    assert head_of(client_settings) is not None
    assert head_of(client_settings, *lines, **changed) is None


@pytest.mark.parametrize("length", ["0", "", "-1", "1e3", "99999999999", "²"])
def test_a_body_of_no_length_or_over_the_limit_goes_through_the_app(client_settings, length):
    fields = [(b"content-length", length.encode())] if length else []
    assert Heads(client_settings).read(b"POST", b"/predict", fields) is None


def test_heads_are_known_by_all_their_bytes_and_as_few_are_kept_as_is_said(client_settings):
    heads = Heads(client_settings)
    head = head_of(client_settings)
    heads.remember(b"one\r\n\r\n123456789", head)
    heads.remember(b"x" * (MOST_BYTES_KEPT + 1) + b"\r\n\r\n123456789", head)
    heads.remember(b"two\r\n\r\n12345678", head)  # is not what the parser found this head in
    assert heads.find(b"one\r\n\r\nabcdefghi") == (head, b"abcdefghi")
    assert heads.find(b"one\r\n\r\nabcdefghij") is None
    assert heads.find(b"One\r\n\r\nabcdefghi") is None
    assert heads.find(b"two\r\n\r\nabcdefghi") is None

    heads.remember(b"key\r\n\r\n123456789", head_of(client_settings, "x-api-key: k"))
    assert heads.find(b"key\r\n\r\n123456789") is None

    for number in range(10 * KEPT):
        heads.remember(b"%d\r\n\r\n123456789" % number, head)
        assert len(heads._known) <= KEPT


def test_a_kept_connection_is_closed_once_it_has_been_idle_and_not_while_requests_come(models):
    async def scenario():
        async with listening(models, Engines(), keep_alive_s=2) as (address, _):
            reader, writer = await asyncio.open_connection(*address)
            loop = asyncio.get_running_loop()
            started, statuses = loop.time(), []
            while loop.time() < started + 3:
                asked = loop.time()
                writer.write(request(FILES[0]))
                statuses.append((await answer(reader))[0])
                await asyncio.sleep(0.1)
            assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
            return statuses, loop.time() - asked  # not since the sleep, which a busy machine makes longer

    statuses, closed_after_s = run(scenario())

    assert set(statuses) == {200}
    assert closed_after_s > 1.9


class Leaver:
    """A caller who hangs up between his call's preparation and its serving."""

    def __init__(self) -> None:
        self.statuses: list[int] = []

    def since_last_byte_s(self) -> float:
        return 0.0

    def run(self, serving) -> None:
        self.serving = serving

    def reply(self, exchange, status, fields, content) -> None:
        self.statuses.append(status)


@pytest.mark.parametrize(
    ("target", "dropped"), [(b"/predict", 1), (b"/predict?model=other", 0)], ids=["good", "faulty"]
)
def test_a_caller_who_leaves_before_his_call_is_served_is_counted_and_leaves_nothing_behind(models, target, dropped):
    async def scenario():
        settings = Settings(models=models, device="cpu", share_identical=False)
        app = create_app(settings, open_engine=Engines())
        async with app.router.lifespan_context(app):
            service, direct, caller = app.state.service, direct_of(app), Leaver()
            await until(lambda: service.is_ready, "ready")
            exchange = Exchange(keep_alive=True)
            length = str(len(FILES[0])).encode()
            head = direct.heads.read(b"POST", target, [(b"content-length", length)])
            direct.take(head, FILES[0], exchange, caller)
            await asyncio.sleep(0)
            exchange.leave()
            await caller.serving
            left = [one for one in gc.get_objects() if type(one) is Call]
            held = service.deployment().opened()._holders, service.classifier()._batcher.admitted
            return caller.statuses, left, held, service.metrics.exposition().decode()

    gc.collect()
    gc.disable()  # which would hide that something waits for it
    try:
        statuses, left, held, metrics = run(scenario())
    finally:
        gc.enable()

    assert (statuses, left, held) == ([499], [], (0, 0))
    assert re.search(r'http_requests_total\{code="499",reason="[\w-]+",route="/predict"\} 1\.0', metrics)
    assert re.search(rf'dropped_total\{{model="tiny",reason="cancelled",version="1"\}} {dropped}\.0', metrics)


def test_a_crowd_beyond_the_queue_costs_no_decoding(models):
    engines = Engines()

    async def scenario():
        async with listening(models, engines, max_queue_size=2, max_images=2, max_batch_size=1) as (address, service):
            engines.opened[0].close_gate()
            callers = [await asyncio.open_connection(*address) for _ in range(20)]
            for _, writer in callers:
                writer.write(request(FILES[0]))
            await until(lambda: b'code="429"' in service.metrics.exposition(), "some are refused")
            engines.opened[0].gate.set()
            statuses = [(await answer(reader))[0] for reader, _ in callers]
            for _, writer in callers:
                writer.close()
            return statuses, service.metrics.exposition().decode()

    statuses, metrics = run(scenario())

    decoded = re.search(r'stage_duration_seconds_count\{model="tiny",stage="decode",version="1"\} (\d+)', metrics)
    assert decoded
    assert set(statuses) == {200, 429}
    assert int(decoded[1]) == statuses.count(200)


def test_a_named_deadline_counts_from_the_last_byte_however_long_its_turn_takes(models):
    async def scenario():
        async with listening(models, Engines()) as (address, service):
            classifier, deadlines = service.classifier(), []
            prepare = classifier.prepare_at_once

            def slowly(image: bytes, deadline: float) -> object:
                deadlines.append(deadline)
                end = time.monotonic() + 0.05
                while time.monotonic() < end:  # the event loop is held, as by many images
                    pass
                return prepare(image, deadline)

            classifier.prepare_at_once = slowly
            callers = [await asyncio.open_connection(*address) for _ in range(6)]
            started = time.monotonic()
            for _, writer in callers:
                writer.write(request(FILES[0], "", "X-Request-Timeout-Ms: 5000"))
            for reader, writer in callers:
                await answer(reader)
                writer.close()
            return [deadline - started for deadline in deadlines]

    within_s = run(scenario())

    assert len(within_s) == 6
    assert min(within_s) > 4.98  # a tick of the kernel's clock less than asked
    assert max(within_s) < 5.5


def test_a_request_whose_serving_breaks_is_not_left_waiting(models, caplog):
    async def scenario():
        async with listening(models, Engines()) as (address, service):
            service.metrics.request = None  # which is called beyond the map of errors
            reader, writer = await asyncio.open_connection(*address)
            writer.write(request(FILES[0]))
            rest = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return rest

    assert run(scenario()) == b""
    assert "a request was left without an answer" in caplog.text


@pytest.mark.parametrize("before", [0, 1], ids=["new head", "known head"])
def test_a_caller_who_reads_no_answers_is_given_no_more_of_them_until_he_does(models, before):
    """Else his answers would pile up in memory, as many as he likes to ask for."""

    async def scenario():
        async with listening(models, Engines()) as (address, _):
            reader, writer = await asyncio.open_connection(*address)
            for _ in range(before):
                writer.write(request(FILES[0]))
                await answer(reader)
            here = writer.get_extra_info("sockname")
            (connection,) = (one for one in gc.get_objects() if type(one) is Connection and one.client == here)
            connection.pause_writing()  # as the event loop does once 64 KiB of answers wait
            writer.write(request(FILES[0]))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.readexactly(1), 0.5)
            connection.resume_writing()
            status, _, _ = await asyncio.wait_for(answer(reader), 10)
            writer.close()
            return status

    assert run(scenario()) == 200
