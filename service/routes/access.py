"""Who may call: dependencies for the endpoints that need an API key. They run before a byte of the body is read."""

from collections.abc import Mapping
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials
from fastapi.security.utils import get_authorization_scheme_param

from service.security import KeyRing, Role

BEARER = HTTPBearer(auto_error=False, description="an API key, where the service asks for one")
HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, description="the same, for clients without Bearer")

Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)]
Header = Annotated[str | None, Security(HEADER)]


# FastAPI would run plain functions in a thread each, which costs a small model a fifth of its time.
async def _require_predict(request: Request, bearer: Bearer, header: Header) -> None:
    _check(request, "predict", bearer, header)


async def _require_admin(request: Request, bearer: Bearer, header: Header) -> None:
    _check(request, "admin", bearer, header)


def _check(request: Request, role: Role, bearer: HTTPAuthorizationCredentials | None, header: str | None) -> None:
    keys: KeyRing = request.app.state.keys
    keys.check(role, bearer.credentials if bearer is not None else header)


async def check_predict(request: Request) -> None:
    """Do what `require_predict` does, without FastAPI. Raises NotAuthenticated or NotPermitted."""
    check_key(request.app.state.keys, request.headers)


def check_key(keys: KeyRing, headers: Mapping[str, str]) -> None:
    """Do what `require_predict` does, by header fields in lower case. Raises NotAuthenticated or NotPermitted."""
    if keys.is_public:
        return
    scheme, bearer = get_authorization_scheme_param(headers.get("authorization"))
    key = bearer if bearer and scheme.lower() == "bearer" else (headers.get("x-api-key") or None)
    keys.check("predict", key)


require_predict = Depends(_require_predict)
require_admin = Depends(_require_admin)
