"""`create_app(settings)`: the only place where objects are built and wired, and where errors become answers."""

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service import problems
from service.config import Settings
from service.crew import Alone, Crew
from service.engine import OpenEngine, open_engine
from service.errors import (
    BodyTooSlow,
    MalformedRequest,
    NotAuthenticated,
    RetryLater,
    ServiceError,
    TooLarge,
    nearest,
    without_frames,
)
from service.inference import Service
from service.logs import REQUEST
from service.metrics import Metrics
from service.observing import REASON, ObserveRequests, Observing, route_of
from service.routes import (
    CERTIFICATE_HEADER,
    GUARANTEE_HEADER,
    certificate_headers,
    extensions,
    models,
    operations,
    page,
    predict,
    repository,
    v2,
    verify,
)
from service.routes.direct import Direct, HasScope
from service.routes.document import ApiDocument
from service.routes.shortcut import Shortcut
from service.schemas import Problem
from service.security import KeyRing
from service.tracing import Tracing, open_tracing

DESCRIPTION = "Image classification whose answers do not depend on what else is in the batch."
CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST", "PUT"],
    "allow_headers": [
        *("Authorization", "Content-Type", "If-None-Match", "X-API-Key", "traceparent"),
        *("X-Request-Id", "X-Request-Priority", "X-Request-Timeout-Ms", "Inference-Header-Content-Length"),
    ],
    "expose_headers": [
        *(CERTIFICATE_HEADER, GUARANTEE_HEADER, "ETag", "Retry-After", "X-Request-Id"),
        "Inference-Header-Content-Length",
    ],
}

logger = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    *,
    open_engine: OpenEngine = open_engine,
    on_failure: Callable[[BaseException], None] | None = None,
    crew: Crew | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Build the service. Models load once it starts; until then it is live and not ready.

    `on_failure` is told what ended the service for good; `crew` are the processes that serve with this one.
    Raises ConfigurationError.
    """
    crew = crew or Alone()
    metrics = Metrics(crew.number)
    service = Service(settings, metrics, open_engine, on_failure, crew)
    document = ApiDocument()
    app: FastAPI = FastAPIOffline(
        title="foldserve",
        version=version("foldserve"),
        description=DESCRIPTION,
        redoc_url=None,
        lifespan=_lifespan,
        routes=[document.route],  # before FastAPI's own
        redirect_slashes=False,  # to a host that the caller names, and clients that send files do not follow
        responses={code: _document(code, title) for code, title in problems.TITLE.items() if code != 499},
    )
    app.state.service = service
    app.state.document = document
    app.state.tracing = tracing or open_tracing(settings.otlp_endpoint)
    app.state.keys = KeyRing(settings.api_keys_file, public_predict=settings.public_predict)
    app.state.observing = Observing(metrics, app.state.tracing, settings.log_requests)
    app.user_middleware.extend(_layers(settings, app.state.observing))
    routers = [one.router for one in (predict, verify, models, repository, operations, page, extensions, v2)]
    for router in (*routers, v2.keyed):
        app.include_router(router)
    app.state.methods = _methods_by_path([*app.routes, *(one for router in routers for one in router.routes)])
    app.mount("/page", page.files)
    app.add_exception_handler(ServiceError, _answer_service_error)
    app.add_exception_handler(RequestValidationError, _answer_wrong_parameter)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_surprise)
    return app


def entry_of(app: FastAPI) -> ASGIApp:
    """Return what a server calls: `app` without what FastAPI asks of the environment at each request."""
    stack = app.build_middleware_stack()

    async def enter(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = app
        await stack(scope, receive, send)

    return enter


def direct_of(app: FastAPI) -> Direct:
    """Return what answers the usual call of /predict in the place of `app`."""
    state = app.state
    return Direct(state.service, state.keys, state.observing, _answer_any)


def _layers(settings: Settings, observing: Observing) -> list[Middleware]:
    """Return what stands around every call, the outermost first."""
    around = Middleware(ObserveRequests, observing=observing, headers_of=certificate_headers)
    layers = [around, Middleware(Shortcut, answer=_answer_service_error)]
    if settings.cors_origins:
        layers.insert(0, Middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS))
    return layers


def _document(code: int, title: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{Problem.__name__}"}
    content = {problems.MEDIA_TYPE: {"schema": schema, "examples": problems.examples(code)}}
    return {"description": title, "content": content}


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    loading = asyncio.create_task(service.start())
    watching = asyncio.create_task(service.watch_runs())
    yield
    service.begin_drain()
    loading.cancel()
    watching.cancel()
    await asyncio.gather(loading, watching, return_exceptions=True)
    await service.stop()
    app.state.observing.tell_of_late()
    app.state.tracing.close()


class _LingeringResponse(Response):
    """An answer to a body that was not read to its end.

    The answer goes out whole, then what still arrives is thrown away for a moment: a socket that is closed on unread
    bytes is reset, and a reset makes the sender lose the answer (RFC 9112, section 9.6).
    """

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(problems.LINGER_S):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})


def _respond(
    request: HasScope, document: dict[str, Any], headers: dict[str, str], kind: type[Response] = Response
) -> Response:
    request.scope[REASON] = document["type"].removeprefix(problems.TYPE_PREFIX)
    if request.scope["path"].startswith("/v2"):
        document = {**document, "error": document["detail"]}  # what clients of the Open Inference Protocol read
    return kind(json.dumps(document, ensure_ascii=False), document["status"], headers, media_type=problems.MEDIA_TYPE)


async def _answer_service_error(request: HasScope, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    without_frames(error)  # to be raised gave it frames, some of which hold the error itself beside the body
    if isinstance(error, TooLarge):
        return _respond(request, problems.problem(error), {"connection": "close"}, _LingeringResponse)
    headers = {"retry-after": str(error.retry_after_s)} if isinstance(error, RetryLater) else {}
    if isinstance(error, BodyTooSlow):
        headers["connection"] = "close"  # the rest of the body is not waited for
    if isinstance(error, NotAuthenticated):
        headers["www-authenticate"] = "Bearer"  # RFC 9110, section 11.6.1
    return _respond(request, problems.problem(error), headers)


async def _answer_wrong_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])
    document: ApiDocument = request.app.state.document
    known = await document.parameters(request, first["loc"][0])
    told = f"it is not known here{nearest(name, known)}" if first["type"] == "extra_forbidden" else first["msg"]
    detail = f"{first['loc'][0]} parameter {name}: {told}; known parameters are {', '.join(known) or 'none'}"
    return await _answer_service_error(request, MalformedRequest(detail))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    known: dict[str, list[str]] = request.app.state.methods
    if methods := known.get(getattr(request.scope.get("route"), "path", "")):
        headers["allow"] = ", ".join(methods)  # Starlette names those of the first route alone
    path = request.url.path
    details = {
        404: f"there is nothing at {path}{_meant(path, known)}; /docs lists what there is",
        405: f"{request.method} is not possible at {path}; possible is {headers.get('allow', 'nothing')}",
    }
    names = {404: "no-such-path", 405: "method-not-allowed"}
    status = error.status_code
    document = problems.document_of(status, names.get(status, "http-error"), details.get(status, str(error.detail)))
    return _respond(request, document, headers)


def _methods_by_path(routes: Iterable[BaseRoute]) -> dict[str, list[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for route in routes:
        if isinstance(route, Route | APIRoute):
            found[route.path] |= set(route.methods or ())
    return {path: sorted(methods) for path, methods in found.items()}


def _meant(path: str, known: Iterable[str]) -> str:
    if path.endswith("/"):
        return f" (did you mean {path.rstrip('/') or '/'}?)"
    first = "/" + path.lstrip("/").partition("/")[0]  # what follows it is often a name
    return nearest(first, [one for one in known if "{" not in one], likeness=0.75)


async def _answer_surprise(request: Request, error: Exception) -> Response:
    service: Service = request.app.state.service
    service.metrics.request(route_of(request.scope), 500, "internal")  # this answer passes by ObserveRequests
    names = request.scope.get(REQUEST.name)
    headers = {name.decode(): value.decode() for name, value in certificate_headers(request.scope)}
    headers |= {} if names is None else {"x-request-id": names.request_id}
    return _respond_to_surprise(request, error, headers)


def _respond_to_surprise(request: HasScope, error: Exception, headers: dict[str, str]) -> Response:
    logger.error("an answer failed in a way that nobody foresaw", exc_info=error)
    return _respond(request, problems.document_of(500, "internal", "the service failed; its log says why"), headers)


async def _answer_any(request: HasScope, error: Exception) -> Response:
    """Answer where no layer of the app stands around an endpoint."""
    if isinstance(error, ServiceError):
        return await _answer_service_error(request, error)
    return _respond_to_surprise(request, error, {})
