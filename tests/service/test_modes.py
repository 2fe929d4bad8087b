"""What strict, report and off do with a model whose batch independence cannot be shown, and where each says so."""

import asyncio
import logging

import httpx
import numpy as np
import pytest
from broken_models import MIXING_NODE, UNKNOWN_NODE, mix_images, use_unknown_operator, write_broken
from PIL import Image
from support import Engines, assert_problem, encode, random_pixels, serving, until

from service.app import create_app
from service.config import Settings
from service.errors import NotCertified
from service.schemas import ModelDetailBody

IMAGE = encode(Image.fromarray(random_pixels(1, seed=17)[0]), "PNG")
BROKEN = {"mixed": (mix_images, MIXING_NODE), "unproven": (use_unknown_operator, UNKNOWN_NODE)}
REMEDY = {"mixed": "evaluation mode", "unproven": "rewrite the operator"}


@pytest.fixture(scope="module", params=BROKEN)
def broken(request, tmp_path_factory):
    """A repository whose one model mixes images, or may: with its verdict and the node that is to blame."""
    edit, node = BROKEN[request.param]
    folder = tmp_path_factory.mktemp("broken")
    write_broken(folder, edit)
    return folder, request.param, node


async def refusal_of(settings: Settings, engines: Engines) -> tuple[str, list[int]]:
    """Start an app that must refuse; return why, and the status codes of those who ask it all the same."""
    reported: list[BaseException] = []
    app = create_app(settings, open_engine=engines, on_failure=reported.append)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
    ):
        await until(lambda: app.state.service.status != "loading", "it starts or fails")
        codes = [(await client.get(path)).status_code for path in ("/healthz", "/readyz", "/info")]
        codes.append((await client.post("/predict", content=IMAGE)).status_code)
    assert [type(one) for one in reported] == [NotCertified], app.state.service.status
    return str(reported[0]), codes


def certificate_header(ask, **request) -> str:
    response = ask("POST", "/predict", **(request or {"content": IMAGE}))
    assert response.status_code == 200, response.text
    return response.headers["foldserve-certificate"]


def test_strict_is_the_default():
    assert Settings().mode == "strict"


def test_strict_refuses_with_the_nodes_own_name_and_what_to_do(broken):
    models, verdict, node = broken

    reason, codes = asyncio.run(refusal_of(Settings(models=models, device="cpu"), Engines()))

    assert codes == [503, 503, 200, 503]
    for part in ("tiny version 1", verdict, node, REMEDY[verdict], "--mode report"):
        assert part in reason


def test_report_serves_and_says_so(broken, caplog):
    models, verdict, node = broken
    with serving(Settings(models=models, device="cpu", mode="report")) as ask:
        header, shown, info = certificate_header(ask), ask("GET", "/models/tiny").json(), ask("GET", "/info").json()
        metrics, receipt = ask("GET", "/metrics").text, ask("POST", "/predict?receipt=true", content=IMAGE)
        ready = ask("GET", "/readyz")

    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert any("WITHOUT a certificate" in one and node in one for one in warnings)
    assert header == "none"
    assert (shown["certificate"]["verdict"], shown["certificate"]["proof"]["verdict"]) == ("refused", verdict)
    assert info["mode"] == "report"
    assert 'verdict="refused"' in metrics
    assert_problem(receipt, 400, "malformed-request")
    assert ready.status_code == 200


def test_a_model_without_a_certificate_shows_no_digest_that_promises_equal_bits(broken):
    models, _, _ = broken
    with serving(Settings(models=models, device="cpu", mode="report")) as ask:
        shown = ask("GET", "/info").json()["models"]["tiny"]

    assert shown["answer_digest"] is None
    assert shown["certificate"] is None


def test_off_does_not_look(broken):
    models, _, _ = broken
    engines = Engines()
    with serving(Settings(models=models, device="cpu", mode="off"), engines) as ask:
        loading = list(engines.opened[0].sizes)
        header, shown, info = certificate_header(ask), ask("GET", "/models/tiny").json(), ask("GET", "/info").json()

    assert loading == [1] * 8, "the golden images and no probe"
    assert header == "none"
    assert shown["certificate"] is None
    assert info["mode"] == "off"
    assert info["models"]["tiny"] | {"certificate": None, "answer_digest": None} == info["models"]["tiny"]


@pytest.mark.parametrize("mode", ["strict", "report"])
def test_a_certified_model_is_served_under_the_same_certificate_everywhere(models, mode):
    with serving(Settings(models=models, device="cpu", mode=mode)) as ask:
        shown = ModelDetailBody.model_validate(ask("GET", "/models/tiny").json()).certificate
        info, metrics = ask("GET", "/info").json(), ask("GET", "/metrics").text
        header = certificate_header(ask)

    assert shown.verdict == "certified"
    assert header == shown.digest
    assert (shown.proof.verdict, shown.reference) == ("independent", shown.shapes[0])
    assert shown.model_digest == info["models"]["tiny"]["digest"]
    assert info["mode"] == mode
    assert info["models"]["tiny"]["certificate"] == shown.digest
    assert info["models"]["tiny"]["answer_digest"] == shown.answer_digest
    assert info["models"]["tiny"]["degraded"] is False
    assert f'digest="{shown.digest}",model="tiny",verdict="certified"' in metrics


def test_every_form_of_answer_names_the_certificate(ask):
    digest = ask("GET", "/info").json()["models"]["tiny"]["certificate"]
    good, bad = ("file", ("a.png", IMAGE)), ("file", ("b.png", b"hello"))

    assert {certificate_header(ask), certificate_header(ask, files=[good, bad])} == {digest}


def test_the_api_document_shows_verify_and_its_answer(ask):
    verify = ask("GET", "/openapi.json").json()["paths"]["/verify"]["post"]

    assert set(verify["requestBody"]["content"]) == {"multipart/form-data"}
    assert {"200", "400", "404", "409", "415"} <= set(verify["responses"])


def test_only_certified_shapes_run_after_the_start(models):
    engines = Engines()
    with serving(Settings(models=models, device="cpu", max_batch_size=6), engines) as ask:
        certified = {one["batch_size"] for one in ask("GET", "/models/tiny").json()["certificate"]["shapes"]}
        engines.opened[0].sizes.clear()
        for count in range(1, 12):
            answer = ask("POST", "/predict", files=[("file", ("x.png", IMAGE))] * count)
            assert len(answer.json()["predictions"]) == count

    assert set(engines.opened[0].sizes) <= certified


def flip_in_crowds(images: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Change the last bit of one logit in every batch of several: what another kernel would do."""
    wrong = logits.copy()
    if len(images) > 1:
        wrong.view(np.uint32)[0, 0] ^= 1
    return wrong


class Twisted(Engines):
    """Engines that were changed behind a certificate's back: same file, same description, other bits."""

    def __call__(self, model_bytes, device):
        engine = super().__call__(model_bytes, device)
        engine.twist = flip_in_crowds
        return engine


def test_an_engine_that_rounds_by_company_loses_those_sizes_and_is_still_true(models, tmp_path):
    with serving(Settings(models=models, device="cpu", state=tmp_path), Twisted()) as ask:
        certificate = ModelDetailBody.model_validate(ask("GET", "/models/tiny").json()).certificate

    assert {shape.batch_size for shape in certificate.shapes} == {1}
    assert {one.shape.batch_size for one in certificate.probe.dropped} == {2, 4, 8}


def test_strict_refuses_when_a_kept_certificate_is_no_longer_true(models, tmp_path):
    settings = Settings(models=models, device="cpu", state=tmp_path)
    with serving(settings):
        pass

    reason, _ = asyncio.run(refusal_of(settings, Twisted()))

    assert "has a certificate for this machine, but" in reason
    assert "foldserve certify tiny --fresh" in reason


def test_report_serves_without_a_certificate_when_a_kept_one_is_no_longer_true(models, tmp_path):
    settings = Settings(models=models, device="cpu", state=tmp_path, mode="report")
    with serving(settings):
        pass
    with serving(settings, Twisted()) as ask:
        assert certificate_header(ask) == "none"
