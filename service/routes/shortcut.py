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


def short_query(scope: Scope) -> PredictQuery | None:
    """Return the parameters of a call of /predict that needs nothing of FastAPI, or None for any other call."""
    if scope["type"] != "http" or scope["path"] != PATH or scope["method"] not in METHODS:
        return None
    return query_of(scope["query_string"])


def query_of(query_string: bytes) -> PredictQuery | None:
    """Return the parameters of /predict, or None where something is wrong with them, or they are long."""
    return _parsed(query_string) if len(query_string) <= QUERY_BYTES else None


@lru_cache(QUERIES_KEPT)
def _parsed(query_string: bytes) -> PredictQuery | None:
    try:
        pairs = parse_qsl(query_string.decode("ascii"), keep_blank_values=True, strict_parsing=bool(query_string))
        given = dict(pairs)
        return PredictQuery.model_validate(given) if len(given) == len(pairs) else None
    except (ValueError, ValidationError):
        return None


class Shortcut:
    """The innermost layer: serves short calls itself, with `answer` for their errors, and hands all others on."""

    def __init__(self, app: ASGIApp, answer: Answer) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = short_query(scope)
        if query is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = ROUTE
        request = Request(scope, receive)
        try:
            await check_predict(request)
            response = await predict(request, query, request.app.state.service)
        except ServiceError as error:
            response = await self._answer(request, error)
        await response(scope, receive, send)
