"""Receipts over HTTP: what an answer was made of, and /verify, which replays it and says what that does not prove."""

import asyncio
import json

import httpx
import numpy as np
import pytest
from PIL import Image
from support import Engines, assert_problem, encode, random_pixels, running, serving, until

from service.config import Settings
from service.independence.receipts import Receipt, logits_digest, pixels_digest
from service.schemas import PredictBody, VerifyBody

PIXELS = random_pixels(2, seed=11)
IMAGE, OTHER = (encode(Image.fromarray(one), "PNG") for one in PIXELS)
KEY = "correct horse battery staple"
NO_ORIGIN = "a replay does not prove who gave the answer"


@pytest.fixture(scope="module")
def signing(models, state):
    with serving(Settings(models=models, device="cpu", state=state, receipt_key=KEY)) as asked:
        yield asked


@pytest.fixture(scope="module")
def uncertified(models):
    with serving(Settings(models=models, device="cpu", mode="off")) as asked:
        yield asked


def receipt_of(ask, image: bytes = IMAGE) -> dict:
    response = ask("POST", "/predict?receipt=true", content=image)
    assert response.status_code == 200, response.text
    return response.json()["predictions"][0]["receipt"]


def verify(ask, receipt: dict | str, image: bytes = IMAGE, url: str = "/verify") -> httpx.Response:
    text = receipt if isinstance(receipt, str) else json.dumps(receipt)
    return ask("POST", url, data={"receipt": text}, files={"file": ("x.png", image)})


def verified(ask, receipt: dict, image: bytes = IMAGE) -> VerifyBody:
    response = verify(ask, receipt, image)
    assert response.status_code == 200, response.text
    return VerifyBody.model_validate(response.json())


def test_a_receipt_names_what_the_answer_was_made_of(ask):
    answer = ask("POST", "/predict?receipt=true&logits=true", content=IMAGE)
    prediction = answer.json()["predictions"][0]
    receipt = Receipt.model_validate(prediction["receipt"])
    shown = ask("GET", "/models/tiny").json()

    assert (receipt.model, receipt.version, receipt.form) == ("tiny", 1, "float")
    assert receipt.model_digest == shown["digest"]
    assert receipt.certificate == answer.headers["foldserve-certificate"]
    assert receipt.answer_digest == shown["certificate"]["answer_digest"]
    assert receipt.pixels == pixels_digest(PIXELS[0])
    assert receipt.logits == logits_digest(np.array(prediction["logits"], np.float32))
    assert receipt.signature is None


def test_there_is_a_receipt_for_each_good_image_and_only_where_asked_for(ask):
    files = [("file", (name, content)) for name, content in {"a": IMAGE, "b": b"hello", "c": OTHER}.items()]

    asked = ask("POST", "/predict?receipt=true", files=files).json()
    not_asked = ask("POST", "/predict", files=files).json()

    PredictBody.model_validate(asked)
    good, bad, other = asked["predictions"]
    assert (good["receipt"]["pixels"], other["receipt"]["pixels"]) == tuple(map(pixels_digest, PIXELS))
    assert "receipt" not in bad
    assert not any("receipt" in one for one in not_asked["predictions"])


def test_the_same_image_gives_the_same_bits_again(ask):
    replay = verified(ask, receipt_of(ask))

    assert (replay.comparable, replay.same_pixels, replay.same_bits) == (True, True, True)
    assert verified(ask, receipt_of(ask), encode(Image.fromarray(PIXELS[0]), "BMP")).same_bits is True, "same pixels"
    assert replay.signature == "not checked"
    assert NO_ORIGIN in replay.detail


def test_receipts_of_a_crowd_hold_alone(ask):
    pixels = random_pixels(8, seed=13)
    images = [encode(Image.fromarray(one), "PNG") for one in pixels]
    answer = ask("POST", "/predict?receipt=true", files=[("file", ("x.png", image)) for image in images]).json()

    for image, prediction in zip(images, answer["predictions"], strict=True):
        assert verified(ask, prediction["receipt"], image).same_bits is True


def test_another_image_is_not_comparable_and_the_reason_is_told(ask):
    replay = verified(ask, receipt_of(ask), OTHER)

    assert (replay.comparable, replay.same_pixels, replay.same_bits) == (False, False, None)
    assert "other pixels than the receipt's" in replay.detail


def test_other_bits_are_told(ask):
    replay = verified(ask, receipt_of(ask) | {"logits": "0" * 64})

    assert (replay.comparable, replay.same_pixels, replay.same_bits) == (True, True, False)
    assert "other bits" in replay.detail


@pytest.mark.parametrize("name, value", [("model_digest", "0" * 64), ("form", "exact"), ("answer_digest", "0" * 64)])
def test_409_for_a_receipt_of_another_file_form_or_machine(ask, name, value):
    assert_problem(verify(ask, receipt_of(ask) | {name: value}), 409, "not-comparable")


def test_404_for_a_model_that_is_not_served_and_a_version_that_is_gone(ask):
    receipt = receipt_of(ask)

    assert_problem(verify(ask, receipt | {"model": "dog"}), 404, "model-not-found")
    assert_problem(verify(ask, receipt | {"version": 2}), 404, "model-not-found")


BROKEN = {
    "no JSON": "hello",
    "nothing": "",
    "a list": "[]",
    "no fields": "{}",
    "an unknown field": {"colour": "red"},
    "a version that is no number": {"version": "one"},
    "another form": {"form": "double"},
    "another schema": {"schema_version": 2},
    "half a character": '{"model": "\\ud800"}',
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_400_for_a_receipt_of_another_form(ask, change):
    receipt = receipt_of(ask) | change if isinstance(change, dict) else change

    assert "receipt" in assert_problem(verify(ask, receipt), 400, "malformed-request")["detail"]


def test_a_receipt_that_is_far_too_long_is_not_even_parsed(ask):
    receipt = b'{"a":[' + b"[]," * 20_000 + b"1]}"
    for part in (("r.json", receipt), (None, receipt)):
        refused = ask("POST", "/verify", files={"receipt": part, "file": ("x.png", IMAGE)})
        detail = assert_problem(refused, 400, "malformed-request")["detail"]
        assert detail.startswith(f"receipt: {len(receipt)} bytes are none")


def test_400_for_parts_that_are_missing_doubled_or_unknown(ask):
    receipt, file = ("receipt", (None, json.dumps(receipt_of(ask)))), ("file", ("x.png", IMAGE))
    wrong = [[receipt], [file], [receipt, ("file", ("x.png", b""))], [receipt, file, ("mask", ("y.png", IMAGE))]]
    wrong += [[receipt, file, ("file", ("y.png", OTHER))], [receipt, receipt, file]]

    for parts in wrong:
        assert_problem(ask("POST", "/verify", files=parts), 400, "malformed-request")


def test_415_for_a_body_that_is_not_multipart_or_no_image_and_422_for_a_damaged_one(ask):
    assert_problem(ask("POST", "/verify", json={"receipt": receipt_of(ask)}), 415, "unsupported-format")
    assert_problem(ask("POST", "/verify", content=IMAGE), 415, "unsupported-format")
    assert_problem(verify(ask, receipt_of(ask), b"hello"), 415, "unsupported-format")
    assert_problem(verify(ask, receipt_of(ask), IMAGE[:60]), 422, "invalid-image")


def test_400_for_an_unknown_query_parameter_whose_message_names_no_other_endpoints(ask):
    detail = assert_problem(verify(ask, receipt_of(ask), url="/verify?model=tiny"), 400, "malformed-request")["detail"]

    assert "model" in detail
    assert "top_k" not in detail, "that is /predict's"


def test_a_signature_is_valid_only_for_what_was_signed(signing):
    receipt = receipt_of(signing)
    genuine = verified(signing, receipt)
    altered = {**receipt, "certificate": "0" * 64}

    assert (genuine.signature, genuine.same_bits) == ("valid", True)
    assert NO_ORIGIN not in genuine.detail
    of_another_key = Receipt.model_validate(receipt).signed(b"another key").model_dump()
    for forged in (altered, of_another_key, {**receipt, "logits": "0" * 64}, {**receipt, "signature": None}):
        replay = verified(signing, forged)
        assert replay.signature == "invalid"
        assert NO_ORIGIN in replay.detail


@pytest.mark.parametrize("signature", ["", "0" * 64, "é", "\x00"], ids=ascii)
def test_a_signature_of_any_text_is_invalid_and_never_our_fault(signing, signature):
    assert verified(signing, receipt_of(signing) | {"signature": signature}).signature == "invalid"


def test_without_a_key_a_signature_is_not_checked(ask, signing):
    replay = verified(ask, receipt_of(signing))

    assert (replay.same_bits, replay.signature) == (True, "not checked")
    assert NO_ORIGIN in replay.detail


def test_an_empty_key_signs_nothing(models):
    with serving(Settings(models=models, device="cpu", receipt_key="")) as ask:
        assert receipt_of(ask)["signature"] is None
        assert verified(ask, receipt_of(ask)).signature == "not checked"


def test_the_key_is_shown_nowhere(models, monkeypatch, caplog):
    monkeypatch.setenv("FOLDSERVE_RECEIPT_KEY", KEY)
    settings = Settings.load(models=models, device="cpu")
    with caplog.at_level("DEBUG"), serving(settings) as ask:
        said = [ask("GET", path).text for path in ("/info", "/metrics", "/models", "/models/tiny", "/openapi.json")]
        said += [ask("POST", "/predict?receipt=true", content=IMAGE).text, verify(ask, "{}").text]

    assert settings.receipt_key.get_secret_value() == KEY
    assert not any(KEY in text for text in (*said, caplog.text, repr(settings), settings.model_dump_json()))


def test_answers_without_a_certificate_have_no_receipts_and_are_not_verified(ask, uncertified):
    answer = uncertified("POST", "/predict?receipt=true", content=IMAGE)

    assert "no certificate" in assert_problem(answer, 400, "malformed-request")["detail"]
    assert_problem(verify(uncertified, receipt_of(ask)), 409, "not-comparable")


def test_a_receipt_that_cannot_be_given_is_refused_before_an_image_is_run(models):
    engines = Engines()
    with serving(Settings(models=models, device="cpu", mode="off"), engines) as ask:
        engines.opened[0].sizes.clear()
        assert_problem(ask("POST", "/predict?receipt=true", content=IMAGE), 400, "malformed-request")

    assert engines.opened[0].sizes == []


def test_a_replay_runs_alone_at_the_reference_shape_and_is_never_spot_checked(models):
    engines = Engines()

    async def scenario():
        settings = Settings(models=models, device="cpu", lanes=1, spot_check_share=1.0)
        async with running(settings, engines) as client:
            service, engine = client._transport.app.state.service, engines.opened[0]
            classifier = service.classifier()
            (answered,) = await classifier.classify([IMAGE], deadline=float("inf"), is_replay=True)
            parts = {"receipt": (None, classifier.receipt(answered, None).model_dump_json()), "file": ("x.png", IMAGE)}
            engine.close_gate()
            replays = [asyncio.create_task(client.post("/verify", files=parts))]
            await until(engine.entered.is_set, "the lane is busy")
            replays += [asyncio.create_task(client.post("/verify", files=parts)) for _ in range(7)]
            await until(lambda: classifier._batcher.depth == 7, "the others wait together")
            engine.gate.set()
            assert {one.json()["same_bits"] for one in await asyncio.gather(*replays)} == {True}
        return engine.sizes, classifier.runner.reference.batch_size, service.metrics.exposition().decode()

    sizes, reference, metrics = asyncio.run(scenario())

    assert sizes == [reference] * 8
    assert "foldserve_spot_checks_total{" not in metrics


def test_a_receipt_of_a_wrong_answer_does_not_verify(models):
    engines = Engines()
    with serving(Settings(models=models, device="cpu", spot_check_share=0.0), engines) as ask:
        engines.opened[0].twist = lambda _, logits: np.nextafter(logits, np.float32(np.inf))
        receipt = receipt_of(ask)
        engines.opened[0].twist = None
        replay = verified(ask, receipt)

    assert (replay.comparable, replay.same_bits) == (True, False)
