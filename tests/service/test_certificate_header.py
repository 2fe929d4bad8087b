"""Every answer about a model names the certificate that it is given under, errors included."""

import json

import pytest
from PIL import Image
from support import Engines, encode, random_pixels, serving

from service.config import Settings

IMAGE = encode(Image.fromarray(random_pixels(1, seed=31)[0]), "PNG")
HEADER = "foldserve-certificate"
BROKEN = {"files": [("file", ("a.png", b"no image")), ("file", ("b.png", b"nor this"))]}


@pytest.fixture(scope="module")
def small(models, state):
    with serving(Settings(models=models, device="cpu", state=state, max_body_bytes=20_000)) as asked:
        yield asked


def digest_of(ask) -> str:
    return ask("GET", "/info").json()["models"]["tiny"]["certificate"]


@pytest.mark.parametrize(
    "status, method, path, request_",
    [
        (200, "POST", "/predict", {"content": IMAGE}),
        (400, "POST", "/predict", {"content": b""}),
        (413, "POST", "/predict", {"content": b"x" * 20_001}),
        (415, "POST", "/predict", {"content": IMAGE, "headers": {"content-type": "text/plain"}}),
        (415, "POST", "/predict", {"content": b"no image"}),
        (415, "POST", "/predict", BROKEN),
        (200, "GET", "/models/tiny", {}),
    ],
    ids=str,
)
def test_answers_and_errors_of_a_model_name_its_certificate(small, status, method, path, request_):
    answer = small(method, path, **request_)

    assert answer.status_code == status, answer.text
    assert answer.headers.get_list(HEADER) == [digest_of(small)]


def test_a_replay_and_its_refusal_name_it_too(small):
    receipt = small("POST", "/predict?receipt=true", content=IMAGE).json()["predictions"][0]["receipt"]
    answers = [
        small("POST", "/verify", data={"receipt": json.dumps(one)}, files={"file": ("x.png", IMAGE)})
        for one in (receipt, {**receipt, "answer_digest": "0"})
    ]

    assert [(one.status_code, one.headers[HEADER]) for one in answers] == [
        (status, digest_of(small)) for status in (200, 409)
    ]


@pytest.mark.parametrize(
    "status, method, path",
    [
        (404, "POST", "/predict?model=other"),
        (400, "POST", "/predict?top_k=none"),
        (405, "DELETE", "/predict"),
        (415, "POST", "/verify"),
        (404, "GET", "/models/other"),
    ],
)
def test_answers_that_reach_no_model_name_none(small, status, method, path):
    answer = small(method, path)

    assert (answer.status_code, answer.headers.get_list(HEADER)) == (status, ["none"])


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/info", "/models", "/openapi.json", "/nowhere"])
def test_answers_about_no_model_carry_no_such_header(small, path):
    assert HEADER not in small("GET", path).headers


def test_an_engine_that_fails_names_it_too(models):
    engines = Engines()
    with serving(Settings(models=models, device="cpu", spot_check_share=0), engines) as ask:
        digest = digest_of(ask)
        engines.opened[0].twist = lambda images, logits: logits * float("nan")
        answer = ask("POST", "/predict", content=IMAGE)

    assert (answer.status_code, answer.headers[HEADER]) == (500, digest)
