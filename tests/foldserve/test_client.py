"""The client repeats what is safe, waits as long as it is told, and keeps the order of many images."""

import asyncio
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from foldserve import AsyncClient, Client, Policy, RequestRefused, ServerUnreachable, progress_bar

QUICK = Policy(retries=2, patience_s=5)


class Script:
    """What a server answers, one after another or by content, and what it was asked.

    `None` closes the connection unanswered.
    """

    def __init__(self, *answers, by_content: dict[bytes, tuple] | None = None) -> None:
        self.answers = list(answers)
        self.by_content = by_content or {}  # where several ask at once, and any may come first
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0


def echo(content: bytes) -> tuple:
    return 200, {}, {"echo": content.decode()}


@contextmanager
def scripted(script: Script) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length", 0)))
            with script.lock:
                script.asked.append((self.path, dict(self.headers), content))
                script.at_once += 1
                script.most_at_once = max(script.most_at_once, script.at_once)
                answer = script.by_content.get(content) or (script.answers.pop(0) if script.answers else echo(content))
            if answer is None:
                self.close_connection = True
            else:
                self._answer(*answer)
            with script.lock:
                script.at_once -= 1

        do_GET = do_POST  # noqa: N815 - the base class calls it so

        def _answer(self, status, headers, body) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(text))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sync_predict(url, image=b"x", policy=QUICK, **query):
    with Client(url, api_key="fsk_a", policy=policy) as client:
        return client.predict(image, **query)


def async_predict(url, image=b"x", policy=QUICK, **query):
    async def scenario():
        async with AsyncClient(url, api_key="fsk_a", policy=policy) as client:
            return await client.predict(image, **query)

    return asyncio.run(scenario())


both = pytest.mark.parametrize("predict", [sync_predict, async_predict])


@both
def test_the_key_and_the_query_are_sent(predict, tmp_path):
    (tmp_path / "x.png").write_bytes(b"image")
    script = Script()
    with scripted(script) as url:
        assert predict(url, tmp_path / "x.png", top_k=2, model=None, logits=True) == {"echo": "image"}

    path, headers, _ = script.asked[0]
    assert path == "/predict?top_k=2&logits=true"
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == "Bearer fsk_a"


@both
@pytest.mark.parametrize("first", [(429, {"retry-after": "0"}, {}), (503, {}, {}), None], ids=["429", "503", "lost"])
def test_what_is_safe_is_sent_again(predict, first):
    script = Script(first)
    with scripted(script) as url:
        assert predict(url) == {"echo": "x"}

    assert len(script.asked) == 2


@both
@pytest.mark.parametrize("status", [400, 401, 413, 422, 500, 504])
def test_what_is_not_safe_or_senseless_is_not_sent_again(predict, status):
    script = Script((status, {}, {"status": status, "detail": "because"}))
    with scripted(script) as url, pytest.raises(RequestRefused, match="because") as caught:
        predict(url)

    assert caught.value.status == status
    assert len(script.asked) == 1


@both
@pytest.mark.parametrize("wait", ["7", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_a_wait_beyond_its_patience_is_not_begun(predict, wait):
    script = Script((429, {"retry-after": wait}, {"detail": "full"}))
    with scripted(script) as url, pytest.raises(RequestRefused, match="full"):
        predict(url)

    assert len(script.asked) == 1


@both
def test_it_gives_up_after_its_retries(predict):
    script = Script(*[(503, {"retry-after": "0"}, {"detail": "loading"})] * 9)
    with scripted(script) as url, pytest.raises(RequestRefused, match="loading"):
        predict(url)

    assert len(script.asked) == 1 + QUICK.retries


@both
def test_a_server_that_is_not_there_is_told_with_its_address(predict):
    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:1"):
        predict("http://127.0.0.1:1", policy=Policy(retries=0))


def test_many_images_come_back_in_order_with_their_own_refusals_and_bounded_concurrency():
    script = Script((200, {}, {"echo": "0"}), (422, {}, {"detail": "bad"}))
    told = []
    images = [str(number).encode() for number in range(30)]
    with scripted(script) as url, Client(url) as client:
        first = list(client.predict_many(images[:2], concurrency=1))
        rest = list(client.predict_many(images[2:], concurrency=4, progress=told.append))

    assert first[0] == {"echo": "0"}
    assert isinstance(first[1], RequestRefused)
    assert [one["echo"] for one in rest] == [image.decode() for image in images[2:]]
    assert told == list(range(1, 29))
    assert script.most_at_once <= 4


class Terminal(io.StringIO):
    """A stream that is, or is not, a person's terminal."""

    def __init__(self, is_one: bool = True) -> None:
        super().__init__()
        self.isatty = lambda: is_one


def test_many_images_move_a_bar_on_a_terminal_and_write_nothing_elsewhere():
    terminal, file = Terminal(), Terminal(is_one=False)
    images = [str(number).encode() for number in range(4)]
    with scripted(Script()) as url, Client(url) as client:
        for stream in (terminal, file):
            assert len(list(client.predict_many(images, progress=progress_bar(len(images), stream)))) == 4

    drawn = terminal.getvalue().split("\r\033[K")[1:]
    assert [one.rpartition(" ")[2] for one in drawn] == ["1/4", "2/4", "3/4", ""], "and the last clears it"
    assert [one.count("█") for one in drawn] == [7, 15, 22, 0]
    assert file.getvalue() == ""


def test_many_images_without_blocking_come_back_in_order():
    script = Script()
    images = [str(number).encode() for number in range(30)]

    async def scenario(url):
        async with AsyncClient(url) as client:
            return [one async for one in client.predict_many(images, concurrency=4)]

    with scripted(script) as url:
        found = asyncio.run(scenario(url))

    assert [one["echo"] for one in found] == [image.decode() for image in images]
    assert script.most_at_once <= 4


def sync_many(url, images, into):
    with Client(url) as client:
        for body in client.predict_many(images, concurrency=2):
            into.append(body["echo"])


def async_many(url, images, into):
    async def scenario():
        async with AsyncClient(url) as client:
            async for body in client.predict_many(images, concurrency=2):
                into.append(body["echo"])

    asyncio.run(scenario())


@pytest.mark.parametrize("predict_many", [sync_many, async_many])
@pytest.mark.parametrize("good", [0, 1, 5])
def test_what_the_images_raise_comes_after_the_answers_of_those_before_it(predict_many, good):
    def images():
        yield from (str(number).encode() for number in range(good))
        raise OSError("the disk has gone")

    found = []
    with scripted(Script()) as url, pytest.raises(OSError, match="the disk has gone"):
        predict_many(url, images(), found)

    assert found == [str(number) for number in range(good)]


def test_who_leaves_many_does_not_wait_for_its_pauses():
    full = (429, {"retry-after": "300"}, {"detail": "full"})
    script = Script(by_content=dict.fromkeys((b"1", b"2", b"3"), full))
    patient = Policy(retries=1, patience_s=1000)
    with scripted(script) as url, Client(url, policy=patient) as client:
        answers = client.predict_many([b"0", b"1", b"2", b"3"], concurrency=2)
        assert next(answers) == {"echo": "0"}
        answers.close()  # as an exception at the caller's, or Ctrl-C, would


def test_an_image_without_bytes_is_refused_by_itself_and_never_sent():
    script = Script()
    with scripted(script) as url, Client(url) as client:
        first, empty, last = client.predict_many([b"1", b"", b"3"])

    assert (first, last) == ({"echo": "1"}, {"echo": "3"})
    assert isinstance(empty, RequestRefused)
    assert (empty.status, empty.problem["type"]) == (415, "urn:foldserve:problem:unsupported-format")
    assert len(script.asked) == 2


@pytest.mark.parametrize(
    ("status", "kind", "is_own"),
    [
        (500, "inference-failed", True),
        (504, "deadline-exceeded", True),
        (408, "body-too-slow", True),
        (500, "internal", False),
        (404, "model-not-found", False),
    ],
)
def test_an_image_that_fails_alone_or_is_late_ends_nothing(status, kind, is_own):
    document = {"type": f"urn:foldserve:problem:{kind}", "status": status, "detail": "it failed"}
    script = Script((status, {}, document), (200, {}, {"echo": "2"}))
    with scripted(script) as url, Client(url) as client:
        answers = client.predict_many([b"1", b"2"], concurrency=1)
        if is_own:
            failed, answered = answers
            assert (failed.status, answered) == (status, {"echo": "2"})
        else:
            with pytest.raises(RequestRefused, match="it failed"):
                list(answers)


def test_a_refusal_that_is_about_every_image_ends_many():
    script = Script((401, {}, {"detail": "no key"}))
    with scripted(script) as url, Client(url) as client, pytest.raises(RequestRefused, match="no key"):
        list(client.predict_many([b"1", b"2", b"3"], concurrency=1))

    assert len(script.asked) <= 3
