"""The one map from errors to HTTP: RFC 9457 problem documents with stable types."""

import json
import re
from http import HTTPStatus
from typing import Any

from service import errors
from service.errors import AllImagesFailed, ServiceError

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:foldserve:problem:"
LINGER_S = 1.0  # how long what was refused is read on, so that its sender gets to read why (RFC 9112, section 9.6)

STATUS: dict[type[ServiceError], int] = {
    errors.MalformedRequest: 400,
    errors.NotAuthenticated: 401,
    errors.NotPermitted: 403,
    errors.ModelNotFound: 404,
    errors.NotSupported: 404,
    errors.BodyTooSlow: 408,
    errors.NotComparable: 409,
    errors.LoadFailed: 409,
    errors.AnswerUnchanged: 412,  # 304 is for GET and HEAD alone (RFC 9110, section 13.1.2)
    errors.TooLarge: 413,
    errors.UnsupportedFormat: 415,
    errors.InvalidImage: 422,
    errors.AllImagesFailed: 422,
    errors.QueueFull: 429,
    errors.CallerGone: 499,  # nginx's number; it never reaches a wire
    errors.InferenceFailed: 500,
    errors.NotReady: 503,
    errors.DeadlineExceeded: 504,
}
TITLE = {
    400: "Malformed request",
    401: "API key needed",
    403: "Not permitted",
    404: "Not found",
    405: "Method not allowed",
    408: "Request too slow",
    409: "Conflict",
    412: "Answer unchanged",
    413: "Too large",
    415: "Format not accepted",
    422: "Image cannot be decoded",
    429: "Queue full",
    431: "Request head too large",
    499: "Caller gone",
    500: "Inference failed",
    503: "Not ready",
    504: "Deadline exceeded",
}
# RFC 9457, section 3.1.3: a title belongs to its type; those whose status has another one's.
OWN_TITLE = {
    "not-comparable": "Not comparable",
    "load-failed": "Load failed",
    "all-images-failed": "No image could be answered",
    "too-many-connections": "Too many connections",
}
# Kinds that are no ServiceError: they are found before a request reaches an endpoint.
ELSEWHERE = {
    405: {"method-not-allowed": "GET is not possible at /predict"},
    408: {"head-too-slow": "the head did not arrive within 10 s"},
    431: {"head-too-large": "the head has over 32768 bytes; send fewer or shorter headers"},
    503: {"too-many-connections": "as many connections are open as may be; ask again"},
}


def slug(error: ServiceError) -> str:
    """Return the error's stable name: `InvalidImage` → `invalid-image`."""
    return _slug(type(error))


def examples(status: int) -> dict[str, Any]:
    """Return a problem document of each kind with this status, by name, as an API document shows them."""
    kinds = {_slug(kind): str(kind.__doc__) for kind, code in STATUS.items() if code == status}
    kinds |= ELSEWHERE.get(status, {})
    return {name: {"value": document_of(status, name, text.splitlines()[0])} for name, text in kinds.items()}


def _slug(kind: type[ServiceError]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__).lower()


def status_of(error: ServiceError) -> int:
    """Return the HTTP status of an error; of several, their common one, else 422."""
    if isinstance(error, AllImagesFailed):
        statuses = {status_of(one) for one in error.errors}
        return statuses.pop() if len(statuses) == 1 else STATUS[AllImagesFailed]
    return STATUS[type(error)]


def problem(error: ServiceError) -> dict[str, Any]:
    """Return the problem document of an error."""
    document = document_of(status_of(error), slug(error), str(error))
    if isinstance(error, AllImagesFailed):
        document["errors"] = [problem(one) for one in error.errors]
    return document


def as_http(status: int, name: str, detail: str, **headers: str) -> bytes:
    """Return a whole HTTP/1.1 answer that closes its connection: for where no application is reached."""
    content = json.dumps(document_of(status, name, detail), ensure_ascii=False).encode()
    top = {"content-type": MEDIA_TYPE, "content-length": str(len(content)), "connection": "close", **headers}
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{key}: {value}" for key, value in top.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


def document_of(status: int, name: str, detail: str) -> dict[str, Any]:
    """Return a problem document; `name` is the last part of its type."""
    title = OWN_TITLE.get(name) or TITLE.get(status) or HTTPStatus(status).phrase
    return {"type": TYPE_PREFIX + name, "title": title, "status": status, "detail": detail}


# To connections beyond `max_connections`, before a byte of them is read.
NO_ROOM = as_http(
    503, "too-many-connections", "as many connections are open as may be; ask again", **{"retry-after": "1"}
)
