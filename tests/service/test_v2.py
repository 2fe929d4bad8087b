"""The Open Inference Protocol: the same bits as /predict, the real client unchanged, any bytes a plain refusal."""

import asyncio
import base64
import gzip
import json
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import Engines, assert_problem, encode, random_pixels, running

from service.config import Settings
from service.errors import MalformedRequest, TooLarge
from service.routes.connection import SINCE_LAST_BYTE
from service.tensors import MOST_MARKS, parse_infer

PIXELS = random_pixels(3, seed=5)
FILES = [encode(Image.fromarray(one), "PNG") for one in PIXELS]
INFER = "/v2/models/tiny/infer"
CORPUS = sorted((Path(__file__).parent / "corpus" / "v2").glob("*"))


def body(shape, datatype, data, **rest) -> dict:
    return {"inputs": [{"name": "image", "shape": shape, "datatype": datatype, "data": data}], **rest}


def framed(parts: list[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def binary(tensor: bytes, shape, datatype, **rest) -> tuple[bytes, dict[str, str]]:
    one = {"name": "image", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(tensor)}}
    head = json.dumps({"inputs": [one], **rest}).encode()
    return head + tensor, {"inference-header-content-length": str(len(head))}


def predicted(ask) -> np.ndarray:
    """Return what /predict says of each file alone: the reference of this whole file."""
    answers = [ask("POST", "/predict?logits=true", content=one).json() for one in FILES]
    return np.array([one["predictions"][0]["logits"] for one in answers], np.float32)


FORMS = {
    "pixels in JSON": (json.dumps(body([3, 8, 8, 3], "UINT8", PIXELS.tolist())).encode(), {}),
    "flat pixels in JSON": (json.dumps(body([3, 8, 8, 3], "UINT8", PIXELS.ravel().tolist())).encode(), {}),
    "files in JSON": (json.dumps(body([3], "BYTES", [base64.b64encode(f).decode() for f in FILES])).encode(), {}),
    "binary pixels": binary(PIXELS.tobytes(), [3, 8, 8, 3], "UINT8"),
    "binary files": binary(framed(FILES), [3], "BYTES"),
    "binary files in a column": binary(framed(FILES), [3, 1], "BYTES"),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_tensor_gives_the_bits_of_predict(ask, form):
    content, headers = FORMS[form]

    answer = ask("POST", INFER, content=content, headers=headers).json()

    (output,) = answer["outputs"]
    assert (answer["model_name"], answer["model_version"]) == ("tiny", "1")
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [3, 3])
    assert np.float32(output["data"]).tobytes() == predicted(ask).tobytes()


@pytest.mark.parametrize("encoding, press", [("gzip", gzip.compress), ("deflate", zlib.compress)])
@pytest.mark.parametrize("path", ["/predict?logits=true", INFER])
def test_a_compressed_body_gives_the_same_answer(ask, path, encoding, press):
    content, headers = (FILES[0], {}) if path != INFER else FORMS["binary files"]

    plain = ask("POST", path, content=content, headers=headers)
    pressed = ask("POST", path, content=press(content), headers={**headers, "content-encoding": encoding})

    assert plain.status_code == 200
    assert pressed.content == plain.content


@pytest.mark.parametrize("path", ["/predict", "/verify", INFER])
def test_413_for_a_body_that_inflates_over_the_limit(models, path):
    async def scenario():
        limits = Settings(models=models, device="cpu", mode="off", max_body_bytes=10_000)
        async with running(limits, Engines()) as client:
            headers = {"content-encoding": "gzip", "content-type": "multipart/form-data; boundary=B"}
            return await client.post(path, content=gzip.compress(bytes(1_000_000)), headers=headers)

    assert_problem(asyncio.run(scenario()), 413, "too-large")


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(FILES[0])[:-9], gzip.compress(FILES[0]) + b"more", b"\x1f\x8b"]
)
def test_400_for_a_body_that_is_not_what_its_encoding_says(ask, content):
    response = ask("POST", "/predict", content=content, headers={"content-encoding": "gzip"})

    assert_problem(response, 400, "malformed-request")


WRONG = {
    "several inputs": ({"inputs": [*body([1], "BYTES", [])["inputs"]] * 2}, "one input, `image`"),
    "no input": ({"inputs": []}, "one input, `image`"),
    "another name": ({"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES"}]}, "one input, `image`"),
    "floats": (body([1, 8, 8, 3], "FP32", [0.5]), "expected UINT8"),
    "another size": (body([1, 9, 8, 3], "UINT8", [0]), "expected UINT8 [n, 8, 8, 3]"),
    "nothing": (body([0], "BYTES", []), "n at least 1"),
    "too few pixels": (body([1, 8, 8, 3], "UINT8", [0] * 191), "holds 191 values"),
    "pixels over 255": (body([1, 8, 8, 3], "UINT8", [256] * 192), "0 to 255"),
    "ragged pixels": (body([1, 8, 8, 3], "UINT8", [[0], [0, 0]]), "0 to 255"),
    "true for pixels": (body([1, 8, 8, 3], "UINT8", [True] * 192), "0 to 255"),
    "no base64": (body([1], "BYTES", ["?"]), "base64"),
    "no data": (body([1], "BYTES", None), "holds 0 values"),
    "another output": (body([1], "BYTES", ["AA=="], outputs=[{"name": "y"}]), "one output, `logits`"),
    "shared memory": (
        {"inputs": [{**body([1], "BYTES", None)["inputs"][0], "parameters": {"shared_memory_region": "r"}}]},
        "shared memory",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_400_says_what_was_expected_and_carries_the_key_that_clients_read(ask, what):
    sent, told = WRONG[what]

    document = assert_problem(ask("POST", INFER, json=sent), 400, "malformed-request")

    assert told in document["detail"]
    assert document["error"] == document["detail"]


@pytest.mark.parametrize("length", ["-1", "x", "99999", "9" * 30, "٣"])
def test_400_for_a_header_length_that_cannot_be(ask, length):
    headers = {"inference-header-content-length": length.encode()}

    assert_problem(ask("POST", INFER, content=b"{}", headers=headers), 400, "malformed-request")


def test_the_limit_of_images_holds(ask):
    content, headers = binary(framed([b"x"] * 9), [9], "BYTES")

    assert_problem(ask("POST", INFER, content=content, headers=headers), 413, "too-large")


def test_one_bad_image_fails_the_request_with_its_own_error(ask):
    content, headers = binary(framed([FILES[0], b"no image"]), [2], "BYTES")

    problem = assert_problem(ask("POST", INFER, content=content, headers=headers), 415, "unsupported-format")
    assert problem["error"].startswith("image 1: ")


@pytest.mark.parametrize("data", [{"data": []}, {}], ids=["empty", "absent"])
def test_pixels_that_were_not_sent_are_counted_and_not_called_wrong(ask, data):
    tensor = {"name": "image", "shape": [1, 8, 8, 3], "datatype": "UINT8", **data}

    problem = assert_problem(ask("POST", INFER, json={"inputs": [tensor]}), 400, "malformed-request")
    assert problem["detail"] == "image holds 0 values, its shape says 192"


@pytest.mark.parametrize("path", ["dog", "tiny/versions/2", "dog/ready", "dog/config"])
def test_404_for_a_model_that_is_not_served(ask, path):
    assert assert_problem(ask("GET", f"/v2/models/{path}"), 404, "model-not-found")["error"]


def test_a_timeout_in_the_request_is_its_deadline(models):
    engines = Engines()

    async def scenario():
        async with running(Settings(models=models, device="cpu", mode="off", lanes=1), engines) as client:
            engines.opened[0].close_gate()
            late = await client.post(INFER, json=body([1, 8, 8, 3], "UINT8", [0] * 192, parameters={"timeout": 50_000}))
            engines.opened[0].gate.set()
            return late

    assert_problem(asyncio.run(scenario()), 504, "deadline-exceeded")


@pytest.mark.parametrize(
    ("parameters", "headers"), [({"timeout": 200_000}, {}), ({}, {"x-request-timeout-ms": "200"})], ids=["v2", "header"]
)
def test_both_ways_to_name_a_deadline_count_from_the_last_byte(models, parameters, headers):
    async def scenario():
        async with running(Settings(models=models, device="cpu", mode="off", lanes=1), Engines()) as client:
            app = client._transport.app

            async def waited(scope, receive, send):
                await app(scope | {SINCE_LAST_BYTE: lambda: 0.3}, receive, send)

            async with httpx.AsyncClient(transport=httpx.ASGITransport(waited), base_url="http://service") as late:
                asked = body([1, 8, 8, 3], "UINT8", [0] * 192, parameters=parameters)
                return await late.post(INFER, json=asked, headers=headers)

    assert_problem(asyncio.run(scenario()), 504, "deadline-exceeded")


def test_a_timeout_of_zero_names_no_deadline(ask):
    answer = ask("POST", INFER, json=body([1, 8, 8, 3], "UINT8", [0] * 192, parameters={"timeout": 0}))

    assert answer.status_code == 200, answer.text


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120), st.one_of(st.none(), st.integers(0, 200)), st.booleans())
@example(b"[" * 5000, None, False)
def test_any_bytes_are_a_request_or_a_refusal(noise, header_length, framing):
    content = noise
    if framing:  # good JSON, and noise where the tensor should be
        content, _ = binary(noise, [2], "BYTES")
        header_length = len(content) - len(noise)
    try:
        found = parse_infer(content, header_length, (8, 8, 3), 8)
    except (MalformedRequest, TooLarge):
        return
    assert b"".join(len(one).to_bytes(4, "little") + one for one in found.images) == noise


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_was_found_once_stays_refused(path):
    content = path.read_bytes()

    for header_length in (None, content.find(b"}]}") + 3):
        with pytest.raises((MalformedRequest, TooLarge)):
            parse_infer(content, header_length, (8, 8, 3), 8)


@pytest.mark.parametrize("path", ["tiny", "tiny/versions/1/ready", "dog/config"])
def test_every_answer_about_a_model_names_the_certificate(ask, path):
    response = ask("GET", f"/v2/models/{path}")

    expected = "none" if response.is_error else ask("GET", "/info").json()["models"]["tiny"]["certificate"]
    assert response.headers["foldserve-certificate"] == expected


def test_a_tensor_is_given_up_at_the_first_element_over_its_shape():
    content, headers = binary(bytes(4_000_000), [2], "BYTES")  # a million empty elements

    with pytest.raises(MalformedRequest, match="are not 2 elements"):
        parse_infer(content, int(headers["inference-header-content-length"]), (8, 8, 3), 8)


@pytest.mark.parametrize("value", [b"[]", b"{}", b"1", b'{"a":1}'])
def test_413_for_json_of_more_values_than_may_be_held(ask, value):
    content = (
        b'{"inputs":[{"name":"image","shape":[1],"datatype":"BYTES","data":[' + (value + b",") * MOST_MARKS + b"1]}]}"
    )

    problem = assert_problem(ask("POST", INFER, content=content), 413, "too-large")
    assert "binary" in problem["error"]


def test_wrong_json_is_held_in_memory_once_however_much_is_wrong_with_it():
    text = b'{"inputs":[{"data":[' + b"[]," * 50_000 + b"1]}]}"  # has no name, no shape, no datatype

    def peak(parse) -> int:
        tracemalloc.start()
        with suppress(MalformedRequest):
            parse(text)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(lambda body: parse_infer(body, None, (8, 8, 3), 8)) < 1.5 * peak(json.loads)
