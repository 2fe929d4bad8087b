"""One connection: what is refused is refused once and let go, and nothing that was sent is kept for nothing."""

import asyncio
import gc
import logging
import socket
import time

import pytest
from http_support import listening, request_of
from PIL import Image
from support import Engines, encode, random_pixels, until
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.arrival import seconds_since_last_byte
from service.errors import ServiceError

IMAGE = encode(Image.fromarray(random_pixels(1)[0]), "PNG")


def test_a_head_that_is_refused_just_before_its_time_is_up_is_refused_once_and_let_go(models, caplog):
    async def scenario():
        closed = asyncio.Event()
        async with listening(models, Engines(), on_closed=closed.set, head_timeout_s=0.3) as (address, service):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"this is no HTTP\r\n\r\n")
            received = await reader.read()
            await asyncio.wait_for(closed.wait(), 10)
            writer.close()
            return received, service.metrics.exposition().decode()

    received, metrics = asyncio.run(asyncio.wait_for(scenario(), 60))

    assert received.startswith(b"HTTP/1.1 400")
    assert received.count(b"HTTP/1.1 4") == 1
    assert 'code="408"' not in metrics
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


CHUNKED = b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


async def talk(address, sent: bytes) -> bytes:
    """Send bytes; return all that comes until the connection ends, nothing where it was reset."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(sent)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("rest", "status", "name"),
    [
        (b"this is no length\r\n", 400, "malformed-request"),
        (b"1\r\nx\r\n0\r\nx-trailer: " + b"a" * 600_000, 431, "head-too-large"),
    ],
    ids=["chunk", "trailers"],
)
def test_what_is_wrong_within_a_body_is_the_answer_to_its_request_and_is_counted(models, rest, status, name):
    async def scenario():
        async with listening(models, Engines(), max_head_bytes=4096) as (address, service):
            return await talk(address, CHUNKED + rest), service.metrics.exposition().decode()

    received, metrics = asyncio.run(asyncio.wait_for(scenario(), 60))

    assert received.startswith(b"HTTP/1.1 %d" % status)
    assert received.count(b"content-length") == 1
    assert name.encode() in received
    assert f'code="{status}",reason="{name}",route="unmatched"' in metrics


def test_what_is_wrong_behind_a_request_is_never_read_as_its_answer_and_is_counted(models):
    async def scenario():
        engines = Engines()
        async with listening(models, engines) as (address, service):
            engines.opened[0].close_gate()
            received = await talk(address, request_of(IMAGE) + b"this is no HTTP\r\n\r\n")
            return received, service.metrics.exposition().decode()

    received, metrics = asyncio.run(asyncio.wait_for(scenario(), 60))

    assert received == b""
    assert 'code="400",reason="malformed-request",route="unmatched"' in metrics


def test_a_body_that_nobody_reads_is_gone_with_its_request(models):
    request = b"GET /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n" + bytes(1000)

    async def scenario():
        async with listening(models, Engines()) as (address, _):
            reader, writer = await asyncio.open_connection(*address)
            gc.collect()
            gc.disable()
            for _ in range(5):
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
            alive = sum(type(one) is RequestResponseCycle for one in gc.get_objects())
            writer.close()
            return alive

    try:
        assert asyncio.run(asyncio.wait_for(scenario(), 60)) <= 1  # the connection's last
    finally:
        gc.enable()


def errors_alive() -> list[object]:
    return [one for one in gc.get_objects() if issubclass(type(one), ServiceError)]


@pytest.mark.parametrize(
    ("head", "status"),
    [(b"POST /predict HTTP/1.1", b"422"), (b"POST /predict?& HTTP/1.1", b"422"), (b"POST /verify HTTP/1.1", b"415")],
    ids=["short", "long", "verify"],
)
def test_a_refused_body_is_gone_with_its_answer(models, head, status):
    request = head + b"\r\nhost: x\r\nconnection: close\r\ncontent-length: 5000\r\n\r\n" + IMAGE[:50].ljust(5000, b"\0")

    async def scenario():
        async with listening(models, Engines()) as (address, _):
            gc.collect()
            gc.disable()
            others = errors_alive()
            for _ in range(5):
                assert (await talk(address, request)).split()[1] == status

            def is_clean() -> bool:
                return all(any(one is other for other in others) for one in errors_alive())

            await until(is_clean, "nothing is left")  # a thread drops its own after it woke the loop; a cycle stays

    try:
        asyncio.run(asyncio.wait_for(scenario(), 60))
    finally:
        gc.enable()


class _Transport:
    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection

    def get_extra_info(self, name: str) -> socket.socket | None:
        assert name == "socket"
        return self._connection


def test_the_kernel_tells_how_long_a_request_has_waited_for_the_event_loop():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as caller:
        server, _ = listener.accept()
        with server:
            caller.sendall(b"POST")
            time.sleep(0.2)  # what is measured: the loop is busy
            assert 0.15 <= seconds_since_last_byte(_Transport(server)) < 5
            caller.sendall(b" /predict")
            assert server.recv(99) == b"POST /predict"
            assert seconds_since_last_byte(_Transport(server)) < 0.15
        assert seconds_since_last_byte(_Transport(server)) == 0, "closed"
    assert seconds_since_last_byte(_Transport(None)) == 0
    with socket.socket(socket.AF_UNIX) as other:
        assert seconds_since_last_byte(_Transport(other)) == 0


UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
SECOND = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize("split", [0, 1, 60])
@pytest.mark.parametrize("form", ["length", "chunked"])
def test_a_request_that_asks_for_http2_is_answered_with_its_body_and_so_is_the_next(models, form, split):
    length = b"content-length: %d\r\n\r\n" % len(IMAGE) + IMAGE
    chunked = b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(IMAGE) + IMAGE + b"\r\n0\r\n\r\n"
    asked = b"POST /predict HTTP/1.1\r\nhost: x\r\n" + UPGRADE + (length if form == "length" else chunked)

    async def scenario():
        async with listening(models, Engines()) as (address, _):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(asked[: len(asked) - split])
            await writer.drain()
            if split:
                await asyncio.sleep(0.05)  # a piece of its own
            writer.write(asked[len(asked) - split :] + SECOND)
            answers = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return answers

    answers = asyncio.run(asyncio.wait_for(scenario(), 60))

    assert answers.count(b"HTTP/1.1 200") == 2, answers
    assert b'"label"' in answers
    assert answers.endswith(b'{"status":"live"}')


def test_any_number_of_requests_that_ask_for_http2_are_answered(models):
    asked = b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + UPGRADE + b"\r\n"

    async def scenario():
        async with listening(models, Engines()) as (address, _):
            return await talk(address, 1200 * asked + SECOND)

    assert asyncio.run(asyncio.wait_for(scenario(), 60)).count(b"HTTP/1.1 200") == 1201


def test_a_body_behind_a_request_for_another_protocol_is_never_a_request(models):
    hidden = b"GET /models HTTP/1.1\r\nhost: x\r\n\r\n"
    asked = b"POST /predict HTTP/1.1\r\nhost: x\r\n" + UPGRADE + b"content-length: %d\r\n\r\n" % len(hidden)

    async def scenario():
        async with listening(models, Engines()) as (address, _):
            return await talk(address, asked + hidden + SECOND)

    answers = asyncio.run(asyncio.wait_for(scenario(), 60))

    assert [one[:3] for one in answers.split(b"HTTP/1.1 ")[1:]] == [b"415", b"200"]
    assert b'"models"' not in answers


BIG = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n\r\n"  # 1.4 MB each


@pytest.mark.parametrize("reads", [False, True])
def test_a_caller_who_reads_nothing_is_cut_off_and_one_who_reads_slowly_is_not(models, reads):
    async def scenario() -> bool:
        closed, loop = asyncio.Event(), asyncio.get_running_loop()
        async with listening(models, Engines(), on_closed=closed.set, send_timeout_s=0.5) as (address, _):
            with socket.socket() as caller:
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                caller.setblocking(False)
                await loop.sock_connect(caller, address)
                await loop.sock_sendall(caller, BIG * 20)
                for _ in range(25):  # more than three times as long
                    if reads:
                        await loop.sock_recv(caller, 2**18)
                    await asyncio.sleep(0.1)
                return closed.is_set()

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) is not reads
