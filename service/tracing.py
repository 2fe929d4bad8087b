"""OpenTelemetry traces, where the extra `otel` is installed and an endpoint is set. Its only user.

One span for each request, a child of the caller's `traceparent`, and below it one for each stage of its way.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from importlib.metadata import version
from time import time_ns
from typing import Any

from service.errors import ConfigurationError

NOTHING = nullcontext()
_CURRENT: ContextVar["Tracing | None"] = ContextVar("tracing", default=None)


def stage(name: str, seconds: float, **attributes: float | str) -> None:
    """Record that a stage of the current request's way ended just now; without tracing this costs next to nothing."""
    tracing = _CURRENT.get()
    if tracing is not None:
        tracing.stage(name, seconds, attributes)


class Tracing:
    """Makes spans with a tracer provider of OpenTelemetry's SDK; without one it does nothing."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer("foldserve", version("foldserve"))

    @property
    def is_on(self) -> bool:
        """True where spans are made."""
        return self._tracer is not None

    def request(self, scope: MutableMapping[str, Any]) -> AbstractContextManager[None]:
        """Keep a server span open while a request is served."""
        return NOTHING if self._tracer is None else self._span(scope)

    @contextmanager
    def _span(self, scope: MutableMapping[str, Any]) -> Iterator[None]:
        assert self._tracer is not None
        from opentelemetry.trace import SpanKind  # noqa: PLC0415 - an extra
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
            TraceContextTextMapPropagator,
        )

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent = TraceContextTextMapPropagator().extract(carrier)
        with self._tracer.start_as_current_span(scope["method"], context=parent, kind=SpanKind.SERVER):
            token = _CURRENT.set(self)
            try:
                yield
            finally:
                _CURRENT.reset(token)

    def answered(self, route: str, status: int, reason: str) -> None:
        """Name the current request's span by its route, and note how it was answered (HTTP conventions, 1.23)."""
        if self._tracer is None:
            return
        from opentelemetry.trace import Status, StatusCode, get_current_span  # noqa: PLC0415

        span = get_current_span()
        span.update_name(f"{getattr(span, 'name', '')} {route}".strip())
        span.set_attributes({"http.route": route, "http.response.status_code": status, "foldserve.reason": reason})
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR, reason))

    def stage(self, name: str, seconds: float, attributes: dict[str, Any]) -> None:
        """Add a span that ended now and lasted `seconds`."""
        assert self._tracer is not None
        ended = time_ns()
        span = self._tracer.start_span(name, start_time=ended - round(1e9 * seconds), attributes=attributes)
        span.end(ended)

    def close(self) -> None:
        """Send what has not been sent."""
        if self._provider is not None:
            self._provider.shutdown()


def open_tracing(endpoint: str | None) -> Tracing:
    """Return tracing that sends spans to an OTLP endpoint over HTTP, or that does nothing without one.

    Raises ConfigurationError when the extra is not installed.
    """
    if endpoint is None:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        raise ConfigurationError("otlp_endpoint needs OpenTelemetry: pip install 'foldserve[otel]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "foldserve"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider)
