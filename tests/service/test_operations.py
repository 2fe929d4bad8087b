"""What operators and readers ask: health, models, metrics, info, and an API page that works without a network."""

import asyncio
import re
import shutil

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from support import Engines, TinyModel, assert_problem, encode, random_pixels, serving, until

from service.app import create_app
from service.config import Settings
from service.errors import ArtifactError, FoldserveError, ModelNotFound
from service.schemas import ModelDetailBody, ModelsBody, PredictBody

IMAGE = encode(Image.fromarray(random_pixels(1)[0]), "PNG")


def test_a_service_is_live_and_ready(ask):
    assert (ask("GET", "/healthz").status_code, ask("GET", "/healthz").json()) == (200, {"status": "live"})
    assert (ask("GET", "/readyz").status_code, ask("GET", "/readyz").json()) == (200, {"status": "ready"})


async def start_failing(settings: Settings) -> tuple[list[BaseException], dict[str, int]]:
    """Start an app that cannot load; return what it reported and what its health endpoints say."""
    reported: list[BaseException] = []
    app = create_app(settings, open_engine=Engines(), on_failure=reported.append)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
    ):
        await until(lambda: bool(reported), "the failure is reported")
        paths = ("/healthz", "/readyz", "/info", "/metrics", "/models")
        return reported, {path: (await client.get(path)).status_code for path in paths}


@pytest.mark.parametrize(
    "damage, error",
    [("no folder", ArtifactError), ("no model", ArtifactError), ("damaged", ArtifactError), ("default", ModelNotFound)],
)
def test_a_service_that_cannot_load_is_neither_live_nor_ready_and_reports_why(tmp_path, models, damage, error):
    root = tmp_path / "models"
    if damage != "no folder":
        shutil.copytree(models, root) if damage != "no model" else root.mkdir()
    if damage == "damaged":
        (root / "tiny" / "1" / "model.onnx").write_bytes(b"hello")
    settings = Settings(models=root, device="cpu", default_model="dog" if damage == "default" else None)

    reported, statuses = asyncio.run(start_failing(settings))

    assert isinstance(reported[0], FoldserveError)
    assert isinstance(reported[0], error)
    assert (statuses["/healthz"], statuses["/readyz"]) == (503, 503)
    assert statuses["/info"] == statuses["/metrics"] == 200


def test_models_are_listed_with_their_digests(ask, models):
    listed = ModelsBody.model_validate(ask("GET", "/models").json()).models

    assert [(one.name, one.version, one.form) for one in listed] == [("tiny", 1, "float")]
    assert listed[0].labels == ["cat", "dog", "owl"]
    assert len(listed[0].digest) == 64


def test_a_model_is_shown_with_what_its_file_says(ask):
    shown = ModelDetailBody.model_validate(ask("GET", "/models/tiny").json())

    assert shown.preprocessing == TinyModel().spec
    assert shown.golden_images == 8
    assert 0 <= shown.golden_difference <= TinyModel().golden().tolerance


def test_a_misspelt_version_shows_no_other_one(ask):
    detail = assert_problem(ask("GET", "/models/tiny?verison=2"), 400, "malformed-request")["detail"]

    assert "verison: it is not known here (did you mean version?)" in detail
    assert detail.endswith("known parameters are version")


def test_info_tells_build_device_limits_and_digests(ask):
    info = ask("GET", "/info").json()

    assert info["name"] == "foldserve"
    assert info["version"]
    assert info["device"] == {"requested": "cpu", "used": "cpu", "why": ""}
    assert info["limits"]["max_images"] == 8
    assert info["formats"][:2] == ["JPEG", "PNG"]
    assert info["models"]["tiny"]["digest"] == ask("GET", "/models").json()["models"][0]["digest"]


def metric(text: str, name: str, **labels: str) -> float:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def test_metrics_count_what_was_asked(models):
    with serving(Settings(models=models, device="cpu")) as ask:
        ask("POST", "/predict", content=IMAGE)
        ask("POST", "/predict", content=b"hello")
        ask("POST", "/predict", files=[("file", ("a.png", IMAGE)), ("file", ("b.txt", b"hello"))])
        for path in ("/nowhere", "/page/page.js", "/page/nowhere"):
            ask("GET", path)
        response = ask("GET", "/metrics")

    text = response.text
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert metric(text, "foldserve_http_requests_total", route="/predict", code="200") == 2
    assert metric(text, "foldserve_http_requests_total", route="/predict", code="415") == 1
    assert metric(text, "foldserve_http_requests_total", route="unmatched", code="404") == 1
    for code in ("200", "404"):
        assert metric(text, "foldserve_http_requests_total", route="/page", code=code) == 1
    assert metric(text, "foldserve_images_total", model="tiny", outcome="ok") == 2
    assert metric(text, "foldserve_images_total", model="tiny", outcome="unsupported-format") == 2
    assert metric(text, "foldserve_batch_size_sum", model="tiny") == 2
    assert metric(text, "foldserve_pending_request_count", model="tiny") == 0
    assert metric(text, "foldserve_ready") == 1
    assert metric(text, "foldserve_device_info", requested="cpu", used="cpu") == 1
    for stage, count in {"read": 3, "decode": 4, "queue": 2, "infer": 2, "encode": 2}.items():
        assert metric(text, "foldserve_stage_duration_seconds_count", stage=stage) == count, stage


def test_paths_that_nobody_has_do_not_make_new_series(ask):
    for index in range(3):
        ask("GET", f"/scan/{index}")

    assert "/scan" not in ask("GET", "/metrics").text


def test_the_api_page_loads_nothing_from_another_host(ask):
    page = ask("GET", "/docs")
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)["']""", page.text)

    assert page.status_code == 200
    assert len(loaded) >= 2, "a script and a style sheet"
    for address in [*loaded, "/openapi.json"]:
        assert address.startswith("/"), address
        assert not address.startswith("//"), address
        assert ask("GET", address).status_code == 200, address
    assert not re.findall(r"@import|url\(\s*['\"]?https?:", page.text)


def references(value: object) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [one for child in value.values() for one in references(child)]
    return [one for child in value for one in references(child)] if isinstance(value, list) else []


def test_the_api_document_is_whole(ask):
    document = ask("GET", "/openapi.json").json()

    assert document["openapi"].startswith("3.1")
    assert document["info"]["title"] == "foldserve"
    assert {"/predict", "/models", "/models/{name}", "/healthz", "/readyz", "/metrics", "/info"} <= set(
        document["paths"]
    )
    for reference in references(document):
        target = document
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]  # a reference to nowhere raises KeyError
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert all(operation["responses"] for operation in operations)


def test_the_api_document_tells_every_form_of_a_request(ask):
    predict = ask("GET", "/openapi.json").json()["paths"]["/predict"]

    assert set(predict) == {"post", "put"}
    for operation in predict.values():
        forms = set(operation["requestBody"]["content"])
        assert {"image/*", "application/octet-stream", "multipart/form-data", "application/json"} == forms
        names = {(parameter["in"], parameter["name"]) for parameter in operation["parameters"]}
        queries = {("query", name) for name in ("model", "version", "top_k", "logits", "receipt")}
        assert names == queries | {("header", f"X-Request-{name}") for name in ("Timeout-Ms", "Priority", "Id")}
        assert {"400", "404", "408", "413", "415", "422", "429", "503", "504"} <= set(operation["responses"])


def test_errors_are_documented_as_problem_documents(ask):
    responses = ask("GET", "/openapi.json").json()["paths"]["/predict"]["post"]["responses"]

    assert list(responses["413"]["content"]) == ["application/problem+json"]


def test_answers_validate_against_the_documented_schema(ask):
    for request in ({"content": IMAGE}, {"files": [("file", ("a.png", IMAGE)), ("file", ("b.txt", b"hello"))]}):
        PredictBody.model_validate(ask("POST", "/predict?logits=true", **request).json())
