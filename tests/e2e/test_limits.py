"""Heads and connections have limits of their own, and who meets one is told so."""

import contextlib
import json
import re
import socket
import time
from contextlib import ExitStack

import httpx
import pytest
from e2e_support import counted, get, post, wait_for
from PIL import Image
from support import encode, random_pixels

from service.connection import TICK_S

pytestmark = pytest.mark.e2e

IMAGE = encode(Image.fromarray(random_pixels(1, seed=5)[0]), "PNG")
LIMIT = 4096  # of the server `strict`
TOP = b"POST /predict HTTP/1.1\r\nhost: x\r\n"
CHUNKED = TOP + b"transfer-encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n0\r\n" % (len(IMAGE), IMAGE)


def connect(server) -> socket.socket:
    address = httpx.URL(server.url)
    return socket.create_connection((address.host, address.port), timeout=20)


def answer_to(server, *pieces: bytes) -> tuple[int, dict]:
    """Return the status and the document that a raw request gets, and see the connection closed after it."""
    with connect(server) as connection:
        for piece in pieces:
            connection.sendall(piece)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    top, _, content = received.partition(b"\r\n\r\n")
    assert b"connection: close" in top.lower()
    return int(top[9:12]), json.loads(content)


LARGE = {
    "one long header": [TOP + b"x-long: " + b"a" * LIMIT + b"\r\n\r\n"],
    "many headers": [TOP + b"x-n: 1\r\n" * (LIMIT // 4) + b"\r\n"],
    "a long path": [b"GET /" + b"a" * LIMIT + b" HTTP/1.1\r\nhost: x\r\n\r\n"],
    "a header without an end": [TOP + b"x-long: ", *[b"a" * 1000] * 20],
    "more in the same piece": [TOP + b"content-length: 9\r\nx-long: " + b"a" * LIMIT + b"\r\n\r\nwhatever."],
}


@pytest.mark.parametrize("pieces", LARGE.values(), ids=LARGE)
def test_431_for_a_head_over_the_limit(strict, pieces):
    before = counted(strict.url, code="431", reason="head-too-large")
    status, document = answer_to(strict, *pieces)

    assert (status, document["type"]) == (431, "urn:foldserve:problem:head-too-large")
    assert str(LIMIT) in document["detail"]
    assert counted(strict.url, code="431", reason="head-too-large") == before + 1


def test_a_head_within_the_limit_and_a_body_beyond_it_are_answered(strict):
    padding = "a" * (LIMIT - 300)
    body = IMAGE + b"\0" * (2 * LIMIT)  # what follows a PNG's end is no part of it

    assert post(strict.url, body, headers={"x-long": padding}).status_code == 200


def test_a_kept_connection_is_not_counted_as_one_long_head(strict):
    with httpx.Client(base_url=strict.url, timeout=30) as client:
        for _ in range(20):
            assert client.post("/predict", content=IMAGE, headers={"x-long": "a" * 1000}).status_code == 200


def test_trailers_without_an_end_are_cut_off(strict):
    before, refused = strict.peak_bytes(), counted(strict.url, code="431", reason="head-too-large")
    with connect(strict) as connection:
        connection.sendall(CHUNKED)
        with contextlib.suppress(OSError):  # it is cut off on the way, or all is thrown away
            connection.sendall(b"x-trailer: " + b"a" * (200 * 2**20))
    assert strict.peak_bytes() - before < 20 * 2**20
    assert counted(strict.url, code="431", reason="head-too-large") > refused
    assert post(strict.url, IMAGE).status_code == 200


def test_trailers_of_a_decent_length_are_passed_over(strict):
    with connect(strict) as connection:
        connection.sendall(CHUNKED + b"x-checksum: abc\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_408_for_a_head_that_trickles(strict):
    started = time.monotonic()
    status, document = answer_to(strict, b"POST /pre", b"dict HTTP/1.1\r\nho")

    assert (status, document["type"]) == (408, "urn:foldserve:problem:head-too-slow")
    assert time.monotonic() - started >= 1 - TICK_S  # by the clock of its event loop
    assert counted(strict.url, code="408", reason="head-too-slow") >= 1


def test_a_second_head_on_a_kept_connection_has_no_more_time_than_the_first(strict):
    with connect(strict) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\r\nGET /hea")
        received = b""
        while piece := connection.recv(65536):
            received += piece

    assert b"HTTP/1.1 408" in received


def test_a_connection_that_never_asks_is_closed(strict):
    with connect(strict) as connection:
        assert connection.recv(1) == b""


def test_400_for_what_is_no_http(strict):
    status, document = answer_to(strict, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # how TLS begins

    assert (status, document["type"]) == (400, "urn:foldserve:problem:malformed-request")
    assert "Invalid HTTP" not in strict.said(), "a stranger's noise is no line of the log"


@pytest.mark.parametrize("workers", [1, 2])
def test_503_for_a_connection_beyond_the_limit_and_those_within_are_served(start, models, workers):
    server = start("--models", str(models), "--workers", str(workers), "--max-connections", "4", "--grace-s", "0")
    with ExitStack() as stack:
        kept = [stack.enter_context(httpx.Client(base_url=server.url, timeout=30)) for _ in range(4 * workers)]
        for client in kept:
            assert client.get("/healthz").status_code == 200
        stranger = stack.enter_context(httpx.Client(base_url=server.url, timeout=30))
        refused = [stranger.post("/predict", content=IMAGE) for _ in range(40)]
        for client in kept:
            assert client.post("/predict", content=IMAGE).status_code == 200
    wait_for(lambda: answers(server), "there is room again")

    assert {one.status_code for one in refused} == {503}
    assert refused[0].json()["type"] == "urn:foldserve:problem:too-many-connections"
    assert refused[0].headers["retry-after"] == "1"
    assert len(re.findall("max_connections are open", server.said())) == 1


def answers(server) -> bool:
    return get(f"{server.url}/healthz").status_code == 200
