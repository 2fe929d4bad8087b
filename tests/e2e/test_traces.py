"""Traces leave a real server over OTLP, with the SDK's own exporter, and hold nothing of an image."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from PIL import Image
from support import encode, random_pixels

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

pytestmark = pytest.mark.e2e

IMAGE = encode(Image.fromarray(random_pixels(1, seed=5)[0]), "PNG")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@contextmanager
def collecting() -> Iterator[tuple[str, list[bytes]]]:
    """Yield the address of a collector, and the bodies that it is sent."""
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    finally:
        server.shutdown()
        server.server_close()


def test_the_spans_of_a_request_reach_a_collector_under_the_callers_trace_and_hold_no_image(start, models):
    parent = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    with collecting() as (endpoint, bodies):
        server = start("--models", str(models), "--otlp-endpoint", endpoint, "--grace-s", "0")
        files = {"file": ("private-name.png", IMAGE)}
        assert httpx.post(f"{server.url}/predict", files=files, headers=parent, timeout=30).status_code == 200
        assert server.terminate() == 0, "what was not sent yet is sent at the end"

    sent = [ExportTraceServiceRequest.FromString(body) for body in bodies]
    spans = [
        span
        for one in sent
        for resource in one.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    by_name = {span.name: span for span in spans if span.trace_id.hex() == TRACE}
    assert set(by_name) == {"POST /predict", "read", "decode", "infer", "encode"}
    assert by_name["POST /predict"].parent_span_id.hex() == "00f067aa0ba902b7"
    assert all(b"private-name" not in body and IMAGE[:12] not in body for body in bodies)
