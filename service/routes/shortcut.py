"""`/predict` past FastAPI's routing and dependencies, which cost a small model more than its own arithmetic.

The same endpoint with the same arguments, and the same map of errors. What is unusual goes the long way: another
method, or a query that FastAPI has to explain.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import parse_qsl

from fastapi import Request, Response
from pydantic import ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ServiceError
from service.routes.access import check_predict
from service.routes.predict import predict
from service.schemas import PredictQuery

PATH: Final = "/predict"
METHODS = frozenset({"POST", "PUT"})
QUERIES_KEPT = 256
QUERY_BYTES = 200  # a longer one goes the long way: 256 as large as a head may be would hold 8 MiB

Answer = Callable[[Request, Exception], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class _Route:
    path: str


ROUTE = _Route(PATH)


def is_short(scope: Scope) -> bool:
    """True for a call of /predict that needs nothing of FastAPI."""
    if scope["type"] != "http" or scope["path"] != PATH or scope["method"] not in METHODS:
        return False
    return len(scope["query_string"]) <= QUERY_BYTES and query_of(scope["query_string"]) is not None


@lru_cache(QUERIES_KEPT)
def query_of(query_string: bytes) -> PredictQuery | None:
    """Return the parameters of /predict, or None where something is wrong with them."""
    try:
        pairs = parse_qsl(query_string.decode("ascii"), keep_blank_values=True, strict_parsing=bool(query_string))
        given = dict(pairs)
        return PredictQuery.model_validate(given) if len(given) == len(pairs) else None
    except (ValueError, ValidationError):
        return None


def shortcut(answer: Answer) -> ASGIApp:
    """Return an app for calls that are short; `answer` turns an error into a response."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = ROUTE
        request = Request(scope, receive)
        query = query_of(scope["query_string"])
        assert query is not None
        try:
            await check_predict(request)
            response = await predict(request, query, request.app.state.service)
        except ServiceError as error:
            response = await answer(request, error)
        await response(scope, receive, send)

    return serve
