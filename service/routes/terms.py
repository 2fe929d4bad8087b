"""What a request asks of the queue: by when it needs its answer, and how urgent it is."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from service.config import Settings
from service.errors import MalformedRequest
from service.queueing import PRIORITIES, Priority

TIMEOUT_HEADER = "x-request-timeout-ms"
PRIORITY_HEADER = "x-request-priority"

HEADERS: list[dict[str, Any]] = [
    {
        "name": "X-Request-Timeout-Ms",
        "in": "header",
        "description": "by when the answer is needed, milliseconds from now; `request_timeout_s` caps it",
        "schema": {"type": "integer", "minimum": 1},
    },
    {
        "name": "X-Request-Priority",
        "in": "header",
        "description": "who goes first in the queue",
        "schema": {"enum": list(PRIORITIES), "default": "normal"},
    },
    {
        "name": "X-Request-Id",
        "in": "header",
        "description": "name of this request in logs and traces; echoed, and made up where it is missing",
        "schema": {"type": "string", "maxLength": 128},
    },
]


@dataclass(frozen=True, slots=True)
class Terms:
    """`deadline` is a time of `time.monotonic`, in seconds."""

    deadline: float
    priority: Priority


@dataclass(frozen=True, slots=True)
class Wish:
    """What a head asks for: an answer within `timeout_s` seconds, `is_timed` where it names them itself."""

    timeout_s: float
    is_timed: bool
    priority: Priority

    def deadline(self, since_last_byte_s: Callable[[], float]) -> float:
        """Return by when the answer is needed, a time of `time.monotonic`, in seconds.

        A time that the caller names counts from when his request arrived, not from when the event loop came to it.
        """
        return time.monotonic() + self.timeout_s - (since_last_byte_s() if self.is_timed else 0.0)


def wish_of(headers: Mapping[str, str], settings: Settings) -> Wish:
    """Read the header fields, whose names are in lower case. Raises MalformedRequest."""
    asked = headers.get(PRIORITY_HEADER, "normal").strip().lower()
    if asked not in PRIORITIES:
        raise MalformedRequest(f"X-Request-Priority: {asked} is not one of {', '.join(PRIORITIES)}")
    wanted = next(one for one in PRIORITIES if one == asked)
    return Wish(_timeout_s(headers, settings), TIMEOUT_HEADER in headers, wanted)


def terms_of(
    headers: Mapping[str, str],
    settings: Settings,
    priority: Priority | None = None,
    *,
    since_last_byte_s: Callable[[], float] = lambda: 0.0,
) -> Terms:
    """Read the headers; `priority` is what the body asks for and wins. Raises MalformedRequest."""
    wish = wish_of(headers, settings)
    return Terms(wish.deadline(since_last_byte_s), priority or wish.priority)


def priority_of_level(level: int) -> Priority:
    """Return the class of a v2 `priority` parameter: 0 is the default, 1 the highest, above 2 low (Triton's scale)."""
    if level < 0:
        raise MalformedRequest(f"priority {level}: expected 0 for the default, 1 high, 2 normal, 3 and above low")
    return ("normal", "high", "normal", "low")[min(level, 3)]


def _timeout_s(headers: Mapping[str, str], settings: Settings) -> float:
    asked = headers.get(TIMEOUT_HEADER)
    if asked is None:
        return settings.request_timeout_s
    if not (asked.isascii() and asked.isdecimal()) or int(asked[:12]) < 1:
        raise MalformedRequest(f"X-Request-Timeout-Ms: {asked[:40]} is not a positive whole number of milliseconds")
    return min(int(asked[:12]) / 1000, settings.request_timeout_s)
