"""A client of the service. One conversation, told as a generator, for both the waiting and the asynchronous kind.

Only what is safe is sent again: a prediction changes nothing, so a lost connection, 429 and 503 may be repeated.
A deadline that passed (504, a read timeout) is not: asking again would add to the load that caused it.
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from os import PathLike
from pathlib import Path
from typing import Any, Self

import httpx

from service.errors import NO_BYTES, FoldserveError, UnsupportedFormat
from service.problems import problem

FIRST_PAUSE_S = 0.1  # doubled at each attempt, where the server does not say how long to wait
RETRY_STATUS = frozenset({429, 503})

Image = bytes | str | PathLike[str]
Body = dict[str, Any]
Progress = Callable[[int], None]
Conversation = Generator[httpx.Request | float, httpx.Response | None, Body]


class ServerUnreachable(FoldserveError):
    """No answer came, also after the attempts that are safe; or it was not foldserve's."""


class RequestRefused(FoldserveError):
    """The service answered with a problem document (RFC 9457), or would: an image without bytes is not sent."""

    def __init__(self, where: str, document: Body) -> None:
        super().__init__(f"{where}: {document.get('detail', document.get('status'))}")
        self.problem = document
        self.status: int = document["status"]

    @property
    def is_about_the_image(self) -> bool:
        """True where another image may well be answered."""
        return self.status in {413, 415, 422}


@dataclass(frozen=True, slots=True)
class Policy:
    """How often, and how long in all, a request is tried again."""

    retries: int = 4
    patience_s: float = 60.0


class _Asking:
    """What both clients know: how to write requests and what to make of answers."""

    def __init__(self, api_key: str | None, policy: Policy) -> None:
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._policy = policy

    def _post(self, client: httpx.Client | httpx.AsyncClient, image: Image, query: Body) -> Conversation:
        encoded = image if isinstance(image, bytes) else Path(image).read_bytes()
        if not encoded:  # a body without a byte would say nothing of an image, and end many
            raise RequestRefused(str(client.base_url.join("predict")), problem(UnsupportedFormat(NO_BYTES)))
        parameters = {name: value for name, value in query.items() if value is not None}
        request = client.build_request("POST", "/predict", content=encoded, params=parameters, headers=self._headers)
        return _converse(request, self._policy)

    def _get(self, client: httpx.Client | httpx.AsyncClient, path: str) -> Conversation:
        return _converse(client.build_request("GET", path, headers=self._headers), self._policy)


class Client(_Asking):
    """Asks a service and waits; for several threads at once. Use as a context manager.

    `predict` takes the query of /predict as keywords: model, version, top_k, logits, receipt.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 30.0, policy: Policy = Policy()
    ) -> None:
        super().__init__(api_key, policy)
        self._http = httpx.Client(base_url=url, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> Body:
        """Return the body of /models. Raises RequestRefused or ServerUnreachable."""
        return self._talk(self._get(self._http, "/models"))

    def predict(self, image: Image, **query: Any) -> Body:
        """Return the body of /predict for a file, by path or bytes. Raises RequestRefused, ServerUnreachable."""
        return self._talk(self._post(self._http, image, query))

    def predict_many(
        self, images: Iterable[Image], *, concurrency: int = 8, progress: Progress | None = None, **query: Any
    ) -> Iterator[Body | RequestRefused]:
        """Yield for each image, in order, its body or the refusal that is its own; `concurrency` are asked for at once.

        At most twice as many are held, so that `images` may be a long generator that reads files.
        `progress` is told how many are done; `foldserve.progress_bar(total)` draws it. Raises RequestRefused for what
        is about every image, ServerUnreachable.
        """
        waiting: deque[Future[Body]] = deque()
        done = 0
        with ThreadPoolExecutor(concurrency, thread_name_prefix="client") as threads:
            try:
                for image in images:
                    waiting.append(threads.submit(self.predict, image, **query))
                    if len(waiting) >= 2 * concurrency:
                        yield _own(waiting.popleft().result)
                        done = _tell(progress, done)
                while waiting:
                    yield _own(waiting.popleft().result)
                    done = _tell(progress, done)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def _talk(self, conversation: Conversation) -> Body:
        step = _Step(conversation)
        while not step.is_over:
            if isinstance(step.wanted, float):
                time.sleep(step.wanted)  # what Retry-After or the backoff asks
                step.go_on(None)
            else:
                with step.catching():
                    step.go_on(self._http.send(step.wanted))
        return step.body


class AsyncClient(_Asking):
    """Asks a service without blocking the event loop. Use as an asynchronous context manager; else as `Client`."""

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 30.0, policy: Policy = Policy()
    ) -> None:
        super().__init__(api_key, policy)
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def models(self) -> Body:
        """Return the body of /models. Raises as `Client` does."""
        return await self._talk(self._get(self._http, "/models"))

    async def predict(self, image: Image, **query: Any) -> Body:
        """Return the body of /predict for a file, by its path or its bytes. Raises as `Client` does."""
        return await self._talk(self._post(self._http, image, query))

    async def predict_many(
        self, images: Iterable[Image], *, concurrency: int = 8, progress: Progress | None = None, **query: Any
    ) -> AsyncIterator[Body | RequestRefused]:
        """Yield for each image, in order, its body or its refusal; at most `concurrency` are asked for at once."""
        waiting: deque[asyncio.Task[Body]] = deque()
        done = 0
        try:
            for image in images:
                waiting.append(asyncio.create_task(self.predict(image, **query)))
                if len(waiting) >= concurrency:
                    await asyncio.wait((waiting[0],))
                    yield _own(waiting.popleft().result)
                    done = _tell(progress, done)
            while waiting:
                await asyncio.wait((waiting[0],))
                yield _own(waiting.popleft().result)
                done = _tell(progress, done)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _talk(self, conversation: Conversation) -> Body:
        step = _Step(conversation)
        while not step.is_over:
            if isinstance(step.wanted, float):
                await asyncio.sleep(step.wanted)
                step.go_on(None)
            else:
                with step.catching():
                    step.go_on(await self._http.send(step.wanted))
        return step.body


class _Step:
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


def _converse(request: httpx.Request, policy: Policy) -> Conversation:
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
            refusal = ServerUnreachable(f"{request.url.copy_with(query=None)}: {error or type(error).__name__}")
            if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout | httpx.UnsupportedProtocol):
                raise refusal from None
        waited_s += pause_s
        if attempt == policy.retries or waited_s > policy.patience_s:
            raise refusal
        yield pause_s
    raise AssertionError


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


def _own(result: Callable[[], Body]) -> Body | RequestRefused:
    try:
        return result()
    except RequestRefused as refusal:
        if not refusal.is_about_the_image:
            raise
        return refusal


def _tell(progress: Progress | None, done: int) -> int:
    if progress is not None:
        progress(done + 1)
    return done + 1
