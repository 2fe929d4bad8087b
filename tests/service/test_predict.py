"""/predict: every form of request gets the same answer, in one shape."""

import base64
import itertools

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax
from support import PROBLEM_TYPE, TinyModel, encode, random_pixels

from service.schemas import PredictBody

TINY = TinyModel()
PIXELS = random_pixels(3, seed=11)
FILES = [encode(Image.fromarray(one), "PNG") for one in PIXELS]
IMAGE = FILES[0]


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def predictions(response) -> list[dict]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    PredictBody.model_validate(response.json())
    return response.json()["predictions"]


def bits(prediction: dict) -> list[int]:
    return np.array(prediction["logits"], np.float32).view(np.uint32).tolist()


@pytest.fixture(scope="module")
def expected(ask):
    """The answers to the three files, each asked for alone."""
    return [predictions(ask("POST", "/predict?logits=true", content=content))[0] for content in FILES]


def test_the_answer_is_the_softmax_of_the_float64_twin(expected):
    for prediction, pixels in zip(expected, PIXELS, strict=True):
        logits = TINY.logits(pixels[np.newaxis])[0]
        scores = softmax(logits)
        tolerance = TINY.tolerance(PIXELS)  # softmax moves by no more than its logits do
        assert prediction["index"] == scores.argmax()
        assert prediction["label"] == TINY.labels[scores.argmax()]
        assert prediction["score"] == pytest.approx(scores.max(), abs=2 * tolerance)
        assert np.abs(np.array(prediction["logits"]) - logits).max() <= tolerance
        assert [one["index"] for one in prediction["top"]] == np.argsort(-scores).tolist()
        assert prediction["top"][0] == {key: prediction[key] for key in ("label", "index", "score")}


def test_logits_read_back_to_the_same_float32_bits(expected):
    for prediction in expected:
        as_doubles = np.array(prediction["logits"], np.float64)
        assert np.array_equal(as_doubles.astype(np.float32).astype(np.float64), as_doubles)


RAW_TYPES = [
    None,
    "application/octet-stream",
    "application/x-www-form-urlencoded",
    "image/png",
    "image/jpeg",
    "image/x",
]


@pytest.mark.parametrize("media_type", [*RAW_TYPES, "IMAGE/PNG", "image/png; name=seven.png"])
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_raw_body_is_an_image_whatever_curl_calls_it(ask, expected, method, media_type):
    headers = {"content-type": media_type} if media_type else {}

    answer = predictions(ask(method, "/predict?logits=true", content=IMAGE, headers=headers))

    assert answer == expected[:1]


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("count", [1, 3])
def test_multipart_takes_one_file_and_many(ask, expected, method, count):
    files = [("file", (f"{index}.png", content)) for index, content in enumerate(FILES[:count])]

    answer = predictions(ask(method, "/predict?logits=true", files=files))

    assert [one["filename"] for one in answer] == [f"{index}.png" for index in range(count)]
    assert [bits(one) for one in answer] == [bits(one) for one in expected[:count]]


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,"])
@pytest.mark.parametrize("count", [1, 3])
def test_json_takes_base64_and_data_urls(ask, expected, prefix, count):
    body = {"images": [prefix + base64_of(content) for content in FILES[:count]]}

    answer = predictions(ask("POST", "/predict?logits=true", json=body))

    assert [bits(one) for one in answer] == [bits(one) for one in expected[:count]]


def test_many_images_come_back_in_their_order_with_the_bits_that_they_have_alone(ask, expected):
    for order in itertools.permutations(range(3)):
        body = {"images": [base64_of(FILES[index]) for index in order]}
        answer = predictions(ask("POST", "/predict?logits=true", json=body))
        assert [bits(one) for one in answer] == [bits(expected[index]) for index in order]


def test_the_body_names_model_version_and_form(ask):
    body = ask("POST", "/predict", content=IMAGE).json()

    assert {key: body[key] for key in ("model", "version", "form")} == {"model": "tiny", "version": 1, "form": "float"}
    assert "logits" not in body["predictions"][0]


@pytest.mark.parametrize("query", ["model=tiny", "version=1", "model=tiny&version=1", "logits=false", ""])
def test_query_parameters_choose_the_model(ask, query):
    assert ask("POST", f"/predict?{query}", content=IMAGE).status_code == 200


@pytest.mark.parametrize("top_k, listed", [(1, 1), (2, 2), (3, 3), (1000, 3)])
def test_top_k_says_how_many_classes_are_listed(ask, top_k, listed):
    assert len(predictions(ask("POST", f"/predict?top_k={top_k}", content=IMAGE))[0]["top"]) == listed


@pytest.mark.parametrize(
    "query", ["top_k=0", "top_k=1001", "top_k=x", "version=0", "version=x", "logits=perhaps", "topk=3", "surprise=1"]
)
def test_a_wrong_query_parameter_is_malformed_and_named(ask, query):
    response = ask("POST", f"/predict?{query}", content=IMAGE)

    assert response.status_code == 400
    assert response.json()["type"] == PROBLEM_TYPE + "malformed-request"
    assert query.partition("=")[0] in response.json()["detail"]


@pytest.mark.parametrize("field", ['name="file"; filename="\\ud800"', 'name="\\ud800"; filename="a"', 'name="\\ud800"'])
def test_half_a_character_in_the_name_of_a_part_is_malformed(ask, field):
    body = f"--B\r\ncontent-disposition: form-data; {field}\r\n\r\nx\r\n--B--\r\n".encode()
    headers = {"content-type": "multipart/form-data; boundary=B; charset=raw_unicode_escape"}

    response = ask("POST", "/predict", content=body, headers=headers)

    assert response.status_code == 400
    assert "half a character" in response.json()["detail"]


def test_a_bad_image_among_good_ones_gets_its_own_error(ask, expected):
    files = [("file", ("a.png", FILES[0])), ("file", ("b.txt", b"hello")), ("file", ("c.png", FILES[2]))]

    good, bad, also_good = predictions(ask("POST", "/predict?logits=true", files=files))

    assert (bits(good), bits(also_good)) == (bits(expected[0]), bits(expected[2]))
    assert set(bad) == {"filename", "error"}
    assert bad["filename"] == "b.txt"
    assert bad["error"]["status"] == 415
    assert bad["error"]["type"] == PROBLEM_TYPE + "unsupported-format"


@pytest.mark.parametrize(
    "contents, status, statuses",
    [
        ((b"hello", b"world"), 415, [415, 415]),
        ((IMAGE[:60], IMAGE[:60]), 422, [422, 422]),
        ((b"hello", IMAGE[:60]), 422, [415, 422]),
    ],
)
def test_when_every_image_is_bad_the_status_is_their_common_one_or_422(ask, contents, status, statuses):
    response = ask("POST", "/predict", json={"images": [base64_of(content) for content in contents]})

    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert [one["status"] for one in response.json()["errors"]] == statuses


@pytest.mark.parametrize("second, status, statuses", [("?", 400, [400, 400]), ("", 422, [400, 415])])
def test_images_that_are_no_base64_count_among_the_bad_ones(ask, second, status, statuses):
    response = ask("POST", "/predict", json={"images": ["not base64!", second]})

    assert response.status_code == status
    assert [one["status"] for one in response.json()["errors"]] == statuses


def test_more_images_than_the_limit_are_too_large(ask):
    for request in (
        {"json": {"images": [base64_of(IMAGE)] * 9}},
        {"files": [("file", ("a.png", IMAGE))] * 9},
    ):
        response = ask("POST", "/predict", **request)
        assert response.status_code == 413, response.text
        assert "8" in response.json()["detail"]


MULTIPART = {"content-type": "multipart/form-data; boundary=B"}


@pytest.mark.parametrize(
    "request_",
    [
        {"content": b""},
        {"content": b"", "headers": {"content-type": "image/png"}},
        {"content": b"", "headers": MULTIPART},
        {"content": b"", "headers": {"content-type": "application/json"}},
        {"content": b"{", "headers": {"content-type": "application/json"}},
        {"content": b"\xff\xfe", "headers": {"content-type": "application/json"}},
        {"content": b"[" * 100_000, "headers": {"content-type": "application/json"}},
        {"json": []},
        {"json": {}},
        {"json": {"images": []}},
        {"json": {"images": [1]}},
        {"json": {"images": "abc"}},
        {"json": {"images": ["not base64!"]}},
        {"json": {"images": ["ÿ"]}},
        {"json": {"images": ["abc"]}},
        {"json": {"images": [base64_of(IMAGE)], "model": "tiny"}},
        {"content": IMAGE, "headers": {"content-type": "multipart/form-data"}},
        {"content": IMAGE, "headers": MULTIPART},
        {"content": b"--B\r\n", "headers": MULTIPART},
        {"content": b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\nhi\r\n--B--\r\n', "headers": MULTIPART},
        {"files": [("image", ("a.png", IMAGE))]},
        {"files": [("file", ("a.png", IMAGE)), ("other", ("b.png", IMAGE))]},
    ],
    ids=lambda request_: repr(request_)[:60],
)
def test_a_body_that_is_not_of_the_documented_form_is_malformed(ask, request_):
    response = ask("POST", "/predict", **request_)

    assert response.status_code == 400, response.text
    assert response.json()["type"] == PROBLEM_TYPE + "malformed-request"


def test_an_empty_image_among_good_ones_is_only_its_own_error(ask):
    answer = predictions(ask("POST", "/predict", json={"images": [base64_of(IMAGE), ""]}))

    assert answer[0]["label"]
    assert answer[1]["error"]["status"] == 415
    assert "no bytes" in answer[1]["error"]["detail"]


@pytest.mark.parametrize("broken", ["not base64!", "abc", "data:image/png;base64,?"])
def test_an_image_that_is_no_base64_among_good_ones_is_only_its_own_error(ask, expected, broken):
    images = [base64_of(FILES[0]), broken, base64_of(FILES[2])]
    good, bad, also_good = predictions(ask("POST", "/predict?logits=true", json={"images": images}))

    assert (bits(good), bits(also_good)) == (bits(expected[0]), bits(expected[2]))
    assert set(bad) == {"filename", "error"}
    assert (bad["error"]["status"], bad["error"]["type"]) == (400, PROBLEM_TYPE + "malformed-request")
    assert "images.1 is not base64" in bad["error"]["detail"]
