"""What a page of another host, a path or an address in a request can reach: nothing."""

import asyncio
import base64
import socket

import pytest
from support import Engines, assert_problem, running

from service.config import Settings

ORIGIN = {"origin": "https://other.example"}
PREFLIGHT = {**ORIGIN, "access-control-request-method": "POST"}


def test_other_origins_may_not_call_by_default(ask):
    assert "access-control-allow-origin" not in ask("GET", "/info", headers=ORIGIN).headers
    assert_problem(ask("OPTIONS", "/predict", headers=PREFLIGHT), 405, "method-not-allowed")


def test_only_the_origins_that_are_named_may_call(models):
    async def scenario():
        settings = Settings(models=models, device="cpu", mode="off", cors_origins="https://other.example")
        async with running(settings, Engines()) as client:
            stranger = {**PREFLIGHT, "origin": "https://third.example"}
            return [await client.options("/predict", headers=headers) for headers in (PREFLIGHT, stranger)]

    named, stranger = asyncio.run(scenario())

    assert named.headers["access-control-allow-origin"] == "https://other.example"
    assert "access-control-allow-credentials" not in named.headers
    assert "access-control-allow-origin" not in stranger.headers


def test_a_named_origin_may_send_and_read_every_header_that_is_documented(models):
    asked = (
        "authorization, if-none-match, traceparent, x-api-key, x-request-id, x-request-priority, x-request-timeout-ms"
    )

    async def scenario():
        settings = Settings(models=models, device="cpu", mode="off", cors_origins=ORIGIN["origin"])
        async with running(settings, Engines()) as client:
            preflight = {**PREFLIGHT, "access-control-request-headers": asked}
            return await client.options("/predict", headers=preflight), await client.get("/info", headers=ORIGIN)

    before, answer = asyncio.run(scenario())

    assert before.status_code == 200, before.text
    exposed = answer.headers["access-control-expose-headers"].lower()
    for name in ("etag", "foldserve-certificate", "foldserve-guarantee", "retry-after", "x-request-id"):
        assert name in exposed


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/page/page.css"])
def test_the_page_and_its_files_carry_security_headers(ask, path):
    headers = ask("GET", path).headers

    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd"])
def test_no_path_leaves_the_folder_of_the_page(ask, path):
    assert_problem(ask("GET", path), 404, "no-such-path")


@pytest.mark.parametrize("name", ["../tiny", "..%2Ftiny", "%2Fetc%2Fpasswd", "tiny%00"])
def test_a_model_is_found_by_name_among_those_served_and_never_by_path(ask, name):
    assert ask("POST", f"/predict?model={name}", content=b"x").status_code == 404
    assert ask("GET", f"/v2/models/{name}/config").status_code == 404


def test_an_address_in_a_request_is_never_fetched(ask):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        tensor = {"name": "image", "shape": [1], "datatype": "BYTES"}
        hidden = base64.b64encode(f'<svg><image href="{url}"/></svg>'.encode()).decode()

        for path, body in (
            ("/predict", {"images": [url]}),
            ("/predict", {"images": [hidden]}),
            ("/v2/models/tiny/infer", {"inputs": [{**tensor, "data": [url]}]}),
        ):
            assert ask("POST", path, json=body).status_code in {400, 415}
        with pytest.raises(BlockingIOError):
            listener.accept()
