"""A real server process: it answers over real sockets, and ends as it should."""

import json
import re
import signal
import socket
import subprocess
import threading
import time

import httpx
import numpy as np
import pytest
from e2e_support import get, post
from PIL import Image
from support import TinyModel, encode, random_pixels

pytestmark = pytest.mark.e2e

PIXELS = random_pixels(2, seed=5)
FILES = [encode(Image.fromarray(one), "PNG") for one in PIXELS]
IMAGE = FILES[0]
TINY = TinyModel()


def chunks(content: bytes, size: int = 50):
    yield from (content[start : start + size] for start in range(0, len(content), size))


def logits_of(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([one["logits"] for one in response.json()["predictions"]], np.float32)


def test_raw_chunked_and_multipart_bodies_get_the_same_bits(server):
    with httpx.Client(base_url=server.url, params={"logits": "true"}, timeout=30) as client:
        raw = logits_of(client.post("/predict", content=IMAGE))
        put = logits_of(client.put("/predict", content=IMAGE, headers={"content-type": "image/png"}))
        chunked = logits_of(client.post("/predict", content=chunks(IMAGE)))
        several = logits_of(client.post("/predict", files=[("file", ("x.png", content)) for content in FILES]))

    assert np.abs(raw - TINY.logits(PIXELS[:1])).max() <= TINY.tolerance(PIXELS)
    for other in (put, chunked, several[:1]):
        assert np.array_equal(other.view(np.uint32), raw.view(np.uint32))


def test_curl_sends_a_file_in_each_of_its_ways(server, tmp_path):
    path = tmp_path / "seven.png"
    path.write_bytes(IMAGE)
    labels = set()
    for way in (["-T", str(path)], ["--data-binary", f"@{path}"], ["-F", f"file=@{path}"]):
        done = subprocess.run(["curl", "-sS", *way, f"{server.url}/predict"], capture_output=True, check=True)
        labels.add(json.loads(done.stdout)["predictions"][0]["label"])

    assert labels == {TINY.labels[int(TINY.logits(PIXELS)[0].argmax())]}


def test_many_clients_at_once_get_the_bits_that_one_gets(server):
    with httpx.Client(base_url=server.url, params={"logits": "true"}, timeout=30) as client:
        alone = [logits_of(client.post("/predict", content=content)) for content in FILES]
        answers: dict[int, np.ndarray] = {}

        def ask(index: int) -> None:
            answers[index] = logits_of(client.post("/predict", content=FILES[index % 2]))

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(answers) == 24
    for index, logits in answers.items():
        assert np.array_equal(logits.view(np.uint32), alone[index % 2].view(np.uint32))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_with_0(start, models, sent):
    server = start("--models", str(models))
    server.process.send_signal(sent)

    assert server.process.wait(30) == 0
    assert "Traceback" not in server.said()
    assert "drained and stopped" in server.said()


def test_an_idle_server_that_may_not_drain_at_all_ends_with_0(start, models):
    server = start("--models", str(models), "--drain-timeout-s", "0")

    assert server.terminate() == 0
    assert "did not end" not in server.said()


def open_request(url: str, length: int) -> socket.socket:
    """Send the head of a request and the promise of `length` bytes."""
    address = httpx.URL(url)
    connection = socket.create_connection((address.host, address.port), timeout=20)
    head = f"POST /predict HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode())
    return connection


def test_a_request_in_flight_is_answered_before_the_server_ends(start, models):
    server = start("--models", str(models))
    with open_request(server.url, len(IMAGE)) as connection:
        connection.sendall(IMAGE[:20])
        server.poll(lambda: "foldserve_ready 1.0" in get(f"{server.url}/metrics").text, "the head has arrived")
        server.process.send_signal(signal.SIGTERM)
        wait_until_refused(server.url)
        connection.sendall(IMAGE[20:])
        answer = connection.recv(65536)

    assert answer.startswith(b"HTTP/1.1 200")
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.said()


def wait_until_refused(url: str) -> None:
    """Wait until nobody listens any more: the signal has been taken."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            get(f"{url}/healthz")
        except httpx.TransportError:
            return
        time.sleep(0.02)
    raise AssertionError("the server still takes connections after the signal")


def test_a_server_answers_health_while_it_loads_and_predicts_when_it_is_ready(server):
    assert get(f"{server.url}/healthz").json() == {"status": "live"}
    assert get(f"{server.url}/readyz").json() == {"status": "ready"}
    assert get(f"{server.url}/docs").status_code == 200


# The command with an engine that never comes back from a black image, as one that hangs in native code.
HANGS_ON_BLACK = """
import sys, threading
from foldserve.cli import main
from service.engine import OnnxEngine

run = OnnxEngine.run

def run_or_hang(self, images, threads=1):
    if not images.any():
        print("hanging", flush=True)
        threading.Event().wait()
    return run(self, images, threads)

OnnxEngine.run = run_or_hang
sys.exit(main(sys.argv[1:]))
"""
BLACK = encode(Image.new("RGB", (8, 8)), "PNG")


def test_a_run_that_never_ends_does_not_keep_the_server_beyond_the_drain(start, models):
    server = start("--models", str(models), "--drain-timeout-s", "1", "--mode", "off", program=("-c", HANGS_ON_BLACK))
    assert post(server.url, IMAGE).status_code == 200
    with open_request(server.url, len(BLACK)) as connection:
        connection.sendall(BLACK)
        server.poll(lambda: "hanging" in server.said(), "the run hangs")
        server.process.send_signal(signal.SIGTERM)

        assert server.process.wait(30) == 1

    assert "a run did not end in time" in server.said()


def test_an_answers_head_and_body_arrive_in_one_piece(server):
    """Else a process that is killed between the two has sent half an answer, which no balancer can ask for again."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: {len(IMAGE)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for _ in range(50):
            connection.sendall(head.encode() + IMAGE)
            answer = connection.recv(2**16)
            said, _, body = answer.partition(b"\r\n\r\n")
            (length,) = re.findall(rb"(?i)content-length: (\d+)", said)
            assert len(body) == int(length)
