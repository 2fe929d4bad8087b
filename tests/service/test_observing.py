"""What is said of a request: its id, its log line, its trace; and what is never said."""

import asyncio
import base64
import io
import json
import logging
from contextlib import contextmanager

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from PIL import Image
from support import GOLDEN_IMAGES, Engines, encode, predict_scope, random_pixels, running, serving, until

from service import logs
from service.app import create_app
from service.config import Settings
from service.metrics import Metrics
from service.observing import ObserveRequests, Observing
from service.tracing import Tracing, open_tracing

IMAGE = encode(Image.fromarray(random_pixels(1, seed=41)[0]), "PNG")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
FIRST_RUNS = GOLDEN_IMAGES  # what loading runs without a probe
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@contextmanager
def log_lines(level: str = "debug", form: str = "json"):
    """Yield where the lines go that the service's own configuration writes."""
    root, stream = logging.getLogger(), io.StringIO()
    before, level_before = root.handlers[:], root.level
    try:
        logs.configure(level, form)
        root.handlers[0].setStream(stream)
        yield stream
    finally:
        root.handlers[:] = before
        root.setLevel(level_before)


def entries(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_id_that_the_caller_gave_is_echoed(ask):
    assert ask("GET", "/healthz", headers={"x-request-id": "order-7/a"}).headers["x-request-id"] == "order-7/a"


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, 'a"b', "a\tb", "é".encode()])
def test_an_id_that_could_break_a_log_line_is_replaced(ask, bad):
    echoed = ask("GET", "/healthz", headers={"x-request-id": bad}).headers["x-request-id"]

    assert len(echoed) == 32
    assert set(echoed) <= set("0123456789abcdef")


def test_errors_carry_the_id_too_and_no_two_requests_have_one(ask):
    ids = [ask("POST", "/predict", content=b"no").headers["x-request-id"] for _ in range(3)]

    assert len(set(ids)) == 3


def test_even_an_answer_to_a_surprise_carries_the_id(models):
    async def scenario():
        async with running(Settings(models=models, device="cpu"), Engines()) as client:
            app = client._transport.app
            app.add_api_route("/surprise", lambda: 1 / 0)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as outside:
                return await outside.get("/surprise", headers={"x-request-id": "mine"})

    assert asyncio.run(scenario()).headers["x-request-id"] == "mine"


def test_a_json_line_tells_route_status_reason_time_request_and_trace(models):
    settings = Settings(models=models, device="cpu", log_requests="all")
    with log_lines() as stream, serving(settings) as ask:
        ask("POST", "/predict", content=b"no", headers={"x-request-id": "mine", "traceparent": PARENT})

    (line,) = [entry for entry in entries(stream) if entry["logger"] == "service.observing"]
    assert line.pop("milliseconds") > 0
    assert line.pop("time").endswith("+00:00")
    assert line.pop("message").startswith("POST /predict 415 unsupported-format in ")
    assert line == {
        "level": "info",
        "logger": "service.observing",
        "request_id": "mine",
        "trace_id": TRACE,
        "method": "POST",
        "route": "/predict",
        "status": 415,
        "reason": "unsupported-format",
    }


def test_by_default_only_requests_that_we_failed_get_a_line(models):
    engines = Engines()
    with log_lines() as stream, serving(Settings(models=models, device="cpu"), engines) as ask:
        ask("POST", "/predict", content=IMAGE)
        ask("POST", "/predict", content=b"no")
        engines.opened[0].twist = lambda images, logits: logits * float("nan")
        ask("POST", "/predict", content=IMAGE)

    told = [entry for entry in entries(stream) if entry["logger"] == "service.observing"]
    assert [(entry["status"], entry["level"]) for entry in told] == [(500, "error")]


def test_a_body_that_cannot_be_read_leaves_no_line_but_the_requests_own(models):
    headers = {"content-type": "multipart/form-data; boundary=B"}
    with log_lines() as stream, serving(Settings(models=models, device="cpu", log_requests="all")) as ask:
        assert ask("POST", "/predict", content=b"no multipart", headers=headers).status_code == 400

    assert [one["logger"] for one in entries(stream) if "request_id" in one] == ["service.observing"]


def test_late_answers_share_a_warning_and_the_rest_is_told_when_the_service_ends(models):
    engines = Engines()
    with log_lines() as stream, serving(Settings(models=models, device="cpu", mode="off"), engines) as ask:
        engines.opened[0].close_gate()
        for _ in range(5):
            assert ask("POST", "/predict", content=IMAGE, headers={"x-request-timeout-ms": "1"}).status_code == 504
        engines.opened[0].gate.set()

    told = [entry for entry in entries(stream) if entry["logger"] == "service.observing"]
    assert [(entry["level"], entry["status"], entry["count"]) for entry in told] == [
        ("warning", 504, 1),
        ("warning", 504, 4),
    ]


def test_late_answers_after_the_first_are_told_together_and_with_no_requests_name():
    async def late(scope, receive, send):
        await send({"type": "http.response.start", "status": 504, "headers": []})

    async def ignore(_):
        pass

    async def scenario(stream):
        observing = Observing(Metrics(), open_tracing(None), "errors", late_every_s=0.02)
        layer = ObserveRequests(late, observing, lambda _: ())
        for _ in range(4):
            await layer(predict_scope(), ignore, ignore)
        await until(lambda: len(entries(stream)) == 2, "a second line")
        return entries(stream)

    with log_lines(level="warning") as stream:
        first, rest = asyncio.run(scenario(stream))

    assert ("request_id" in first, first["count"]) == (True, 1)
    assert ("request_id" in rest, rest["count"]) == (False, 3)


def test_a_line_for_people_ends_with_the_id(models):
    with log_lines(form="text") as stream, serving(Settings(models=models, device="cpu", log_requests="all")) as ask:
        ask("GET", "/healthz", headers={"x-request-id": "mine"})

    assert any("GET /healthz 200 ok" in line and line.endswith("[mine]") for line in stream.getvalue().splitlines())


def test_neither_an_image_nor_its_name_is_ever_logged(models):
    """All levels, all forms of a request, good and bad images, a model that fails: no piece of them in any line."""
    engines = Engines()
    secret, name = b"PRIVATE-" + IMAGE, "private-name.png"
    damaged = IMAGE[:-20] + b"PRIVATE-"
    text = base64.b64encode(IMAGE).decode()
    with log_lines() as stream, serving(Settings(models=models, device="cpu", log_requests="all"), engines) as ask:
        for _ in range(2):
            for content in (IMAGE, secret, damaged):
                ask("POST", "/predict", content=content)
                ask("POST", "/predict?receipt=true", files={"file": (name, content)})
                ask("POST", f"/predict?{name}=1", content=content)
                ask("POST", f"/{name}", content=content)
            ask("POST", "/predict", json={"images": [text, "PRIVATE-"]})
            ask("POST", "/verify", data={"receipt": "PRIVATE-"}, files={"file": (name, IMAGE)})
            engines.opened[0].twist = lambda images, logits: logits * float("nan")  # the second round fails

    told = "\n".join(line for line in stream.getvalue().splitlines() if json.loads(line)["logger"] != "httpx")
    assert "service.observing" in told
    assert "PRIVATE-" not in told
    assert "private-name" not in told
    assert text[:24] not in told
    assert repr(IMAGE[:12])[2:-1] not in told


@contextmanager
def traced(models, engines=None, **options):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(
        Settings(models=models, device="cpu", **options), open_engine=engines or Engines(), tracing=Tracing(provider)
    )

    def ask(*requests) -> list:
        async def scenario():
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
            ):
                await until(lambda: app.state.service.is_ready, "ready")
                await asyncio.gather(*(client.post("/predict", **options) for options in requests))
            return exporter.get_finished_spans()

        return asyncio.run(asyncio.wait_for(scenario(), 30))

    yield ask


def test_a_request_is_a_span_with_its_stages_below_the_callers_own(models):
    with traced(models) as ask:
        spans = ask({"content": IMAGE, "headers": {"traceparent": PARENT}})

    by_name = {span.name: span for span in spans}
    assert set(by_name) == {"POST /predict", "read", "decode", "infer", "encode"}
    server = by_name["POST /predict"]
    assert server.kind == SpanKind.SERVER
    assert f"{server.context.trace_id:032x}" == TRACE
    assert f"{server.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert server.attributes["http.response.status_code"] == 200
    for name in ("read", "decode", "infer", "encode"):
        assert by_name[name].parent.span_id == server.context.span_id, name
        assert by_name[name].start_time <= by_name[name].end_time
    assert by_name["infer"].attributes == {"model": "tiny", "version": 1}


def test_spans_of_requests_at_the_same_time_do_not_mix(models):
    with traced(models) as ask:
        spans = ask(*[{"content": IMAGE}] * 5)

    servers = {span.context.span_id: span for span in spans if span.kind == SpanKind.SERVER}
    assert len(servers) == 5
    for span in spans:
        if span.kind != SpanKind.SERVER:
            assert servers[span.parent.span_id].context.trace_id == span.context.trace_id


class Failing(Engines):
    """Its engines answer their golden images and nothing after."""

    def __call__(self, model_bytes, device):
        engine = super().__call__(model_bytes, device)
        engine.twist = lambda images, logits: logits * (float("nan") if len(engine.sizes) > FIRST_RUNS else 1.0)
        return engine


def test_a_request_that_we_failed_is_an_error_and_one_that_the_client_spoiled_is_not(models):
    with traced(models, mode="off", engines=Failing()) as ask:
        failed, spoiled = sorted(
            (span for span in ask({"content": b"no"}, {"content": IMAGE}) if span.kind == SpanKind.SERVER),
            key=lambda span: -span.attributes["http.response.status_code"],
        )

    assert (failed.status.status_code, failed.attributes["foldserve.reason"]) == (StatusCode.ERROR, "inference-failed")
    assert (spoiled.status.status_code, spoiled.attributes["foldserve.reason"]) == (
        StatusCode.UNSET,
        "unsupported-format",
    )


def test_without_an_endpoint_nothing_is_traced(ask):
    assert open_tracing(None)._tracer is None
    assert ask("POST", "/predict", content=IMAGE).status_code == 200
