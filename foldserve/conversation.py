"""One request told as a generator, for clients that wait and for those that do not: what to send, how long to pause.

Only what is safe is sent again: a prediction changes nothing, so a lost connection, 429 and 503 may be repeated.
A deadline that passed (504, a read timeout) is not: asking again would add to the load that caused it.
"""

import contextlib
import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from service.errors import FoldserveError

FIRST_PAUSE_S = 0.1  # doubled at each attempt, where the server does not say how long to wait
RETRY_STATUS = frozenset({429, 503})

Body = dict[str, Any]
Conversation = Generator[httpx.Request | float, httpx.Response | None, Body]


class ServerUnreachable(FoldserveError):
    """No answer came, also after the attempts that are safe; or it was not foldserve's."""


class KeyRefused(FoldserveError):
    """An API key that no header can hold; it is not repeated."""


class RequestRefused(FoldserveError):
    """The service answered with a problem document (RFC 9457), or would: an image without bytes is not sent."""

    def __init__(self, where: str, document: Body) -> None:
        super().__init__(f"{where}: {document.get('detail', document.get('status'))}")
        self.problem = document
        self.status: int = document["status"]

    @property
    def is_about_the_image(self) -> bool:
        """True where another image may well be answered: also one that was slow, late, or failed alone."""
        failed_alone = str(self.problem.get("type", "")).endswith(":inference-failed")
        return self.status in {408, 413, 415, 422, 504} or failed_alone


@dataclass(frozen=True, slots=True)
class Policy:
    """How often, and how long in all, a request is tried again."""

    retries: int = 4
    patience_s: float = 60.0


USUAL = Policy()


class Step:
    """Where a conversation stands: the request or the pause it wants next, or the body it ended with."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self.is_over = False
        self.body: Body = {}
        self.wanted = next(conversation)

    def go_on(self, response: httpx.Response | None) -> None:
        self._advance(lambda: self._conversation.send(response))

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Tell the conversation of an exchange that failed."""
        try:
            yield
        except httpx.TransportError as error:
            failure = error
            self._advance(lambda: self._conversation.throw(failure))

    def _advance(self, move: Callable[[], httpx.Request | float]) -> None:
        try:
            self.wanted = move()
        except StopIteration as end:
            self.is_over, self.body = True, end.value


def converse(request: httpx.Request, policy: Policy) -> Conversation:
    """Yield the request to send, or seconds to wait; return the body. Raises RequestRefused or ServerUnreachable."""
    waited_s = 0.0
    for attempt in range(policy.retries + 1):
        pause_s = FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0)  # noqa: S311 - spreads callers, guards nothing
        try:
            response = yield request
            assert response is not None
            if response.status_code not in RETRY_STATUS:
                return _body(response)
            pause_s = _retry_after_s(response, pause_s)
            refusal: FoldserveError = _refusal(response)
        except httpx.TransportError as error:
            told = (str(error) or type(error).__name__).rstrip(".")
            refusal = ServerUnreachable(f"{request.url.copy_with(query=None)}: {told}{_way_out(error)}")
            if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout | httpx.UnsupportedProtocol):
                raise refusal from None
        waited_s += pause_s
        if attempt == policy.retries or waited_s > policy.patience_s:
            raise refusal
        yield pause_s
    raise AssertionError


def _way_out(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.UnsupportedProtocol):
        return "; write its address as http://host:port"
    return "; does it run there? `foldserve serve` starts one" if isinstance(error, httpx.ConnectError) else ""


def _retry_after_s(response: httpx.Response, default_s: float) -> float:
    """Return what Retry-After says, in seconds: a number or a date (RFC 9110, section 10.2.3)."""
    text = response.headers.get("retry-after", "")
    if text.isdecimal():
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return default_s


def _body(response: httpx.Response) -> Body:
    if response.is_error:
        raise _refusal(response)
    return _json(response)


def _refusal(response: httpx.Response) -> RequestRefused:
    return RequestRefused(str(response.url.copy_with(query=None)), {"status": response.status_code, **_json(response)})


def _json(response: httpx.Response) -> Body:
    with contextlib.suppress(ValueError):
        body = response.json()
        if isinstance(body, dict):
            return body
    raise ServerUnreachable(f"{response.url}: status {response.status_code}, and not foldserve's JSON")
