"""What the head of a usual call of /predict asks for, read once: most clients send the same bytes each time.

Where anything else than the endpoint has a word to say of a request there is no such head, and it goes through the app:
another path, a query that has to be explained, forms and JSON, a body of unknown length, an expectation, a page of
another site.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from service.config import Settings
from service.errors import MalformedRequest
from service.observing import given_names
from service.routes.bodies import is_raw
from service.routes.shortcut import METHODS, PATH, query_of
from service.routes.terms import Wish, wish_of
from service.schemas import PredictQuery

END: Final = b"\r\n\r\n"
KEPT = 256  # heads; those with an id of their own push each other out
MOST_BYTES_KEPT = 1024  # of one head
TARGET: Final = PATH.encode()
METHOD_NAMES: Final = {name.encode(): name for name in METHODS}
# What the layers around the endpoint or the server itself answer to, and what changes a body.
ELSEWHERE: Final = frozenset({"content-encoding", "expect", "origin", "transfer-encoding", "upgrade"})

KEYS: Final = frozenset({"authorization", "x-api-key"})

Fields = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Head:
    """One call: `fields` by their names in lower case, `length` of the body in bytes, the names that it brings."""

    method: str
    query: PredictQuery
    fields: Mapping[str, str]
    length: int
    wish: Wish
    request_id: str | None
    trace_id: str | None


class Heads:
    """Reads heads, and remembers those that came before, byte by byte."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[bytes, Head] = {}

    def read(self, method: bytes, target: bytes, fields: Fields) -> Head | None:
        """Return what a head asks for, the names of its fields in lower case; None where it goes through the app."""
        path, _, query_string = target.partition(b"?")
        if path != TARGET or b"#" in query_string or method not in METHOD_NAMES:
            return None
        query = query_of(query_string)
        named = {name.decode("latin-1"): value.decode("latin-1") for name, value in fields}
        is_usual = len(named) == len(fields) and ELSEWHERE.isdisjoint(named) and is_raw(named.get("content-type", ""))
        length = named.get("content-length", "")
        if query is None or not is_usual or not length.isdecimal():
            return None
        if not 0 < int(length) <= self._settings.max_body_bytes:
            return None
        try:
            wish = wish_of(named, self._settings)
        except MalformedRequest:
            return None
        return Head(METHOD_NAMES[method], query, named, int(length), wish, *given_names(fields))

    def find(self, data: bytes) -> tuple[Head, bytes] | None:
        """Return head and body where `data` is a whole request whose head is known."""
        front, _, body = data.partition(END)
        head = self._known.get(front)
        return None if head is None or len(body) != head.length else (head, body)

    def remember(self, data: bytes, head: Head) -> None:
        """Keep `head`, which the parser found in `data`, where that is one whole request and nothing else.

        One with a key in it is not kept: a key that is withdrawn should not lie about in memory.
        """
        front, _, body = data.partition(END)
        if len(body) == head.length and len(front) <= MOST_BYTES_KEPT and KEYS.isdisjoint(head.fields):
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[front] = head
