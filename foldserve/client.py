"""A client of the service: one that waits, and one that does not block the event loop; `conversation` says what for."""

import asyncio
import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, Self

import httpx

from foldserve.conversation import USUAL, Body, Conversation, KeyRefused, Policy, RequestRefused, Step, converse
from service.errors import NO_BYTES, UnsupportedFormat
from service.problems import problem

KEY = re.compile(r"[!-~]+")  # what a header can hold, without blanks

Image = bytes | str | PathLike[str]
Progress = Callable[[int], None]


class _Asking:
    """What both clients know: how to write requests and what to make of answers."""

    def __init__(self, api_key: str | None, policy: Policy) -> None:
        if api_key and not KEY.fullmatch(api_key):
            raise KeyRefused("the API key is none: expected one word as `foldserve keys add NAME` prints it")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._policy = policy

    def _post(self, client: httpx.Client | httpx.AsyncClient, image: Image, query: Body) -> Conversation:
        encoded = image if isinstance(image, bytes) else Path(image).read_bytes()
        if not encoded:  # a body without a byte would say nothing of an image, and end many
            raise RequestRefused(str(client.base_url.join("predict")), problem(UnsupportedFormat(NO_BYTES)))
        parameters = {name: value for name, value in query.items() if value is not None}
        request = client.build_request("POST", "/predict", content=encoded, params=parameters, headers=self._headers)
        return converse(request, self._policy)

    def _get(self, client: httpx.Client | httpx.AsyncClient, path: str) -> Conversation:
        return converse(client.build_request("GET", path, headers=self._headers), self._policy)


class Client(_Asking):
    """Asks a service and waits; for several threads at once. Use as a context manager.

    `predict` takes the query of /predict as keywords: model, version, top_k, logits, receipt.
    Raises KeyRefused for an `api_key` that no header can hold.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 30.0, policy: Policy = USUAL
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
        is about every image, ServerUnreachable, and what `images` raises, each in its place: after what came before.
        """
        waiting: deque[Future[Body]] = deque()
        done, source, leaving = 0, _Source(images), threading.Event()

        def ask(image: Image) -> Body:
            return self._talk(self._post(self._http, image, query), leaving)

        with ThreadPoolExecutor(concurrency, thread_name_prefix="client") as threads:
            try:
                for image in source:
                    waiting.append(threads.submit(ask, image))
                    if len(waiting) >= 2 * concurrency:
                        yield _own(waiting.popleft().result)
                        done = _tell(progress, done)
                while waiting:
                    yield _own(waiting.popleft().result)
                    done = _tell(progress, done)
                source.raise_failure()
            finally:
                leaving.set()
                threads.shutdown(wait=False, cancel_futures=True)

    def _talk(self, conversation: Conversation, leaving: threading.Event | None = None) -> Body:
        """Return the body that a conversation ends with; give up at its next pause once `leaving` is set."""
        step, leaving = Step(conversation), leaving or threading.Event()
        while not step.is_over:
            if isinstance(step.wanted, float):
                if leaving.wait(step.wanted):  # what Retry-After or the backoff asks
                    raise CancelledError
                step.go_on(None)
            else:
                with step.catching():
                    step.go_on(self._http.send(step.wanted))
        return step.body


class AsyncClient(_Asking):
    """Asks a service without blocking the event loop. Use as an asynchronous context manager; else as `Client`."""

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 30.0, policy: Policy = USUAL
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
        """Yield for each image, in order, its body or its refusal; at most `concurrency` are asked for at once.

        Raises as `Client` does.
        """
        waiting: deque[asyncio.Task[Body]] = deque()
        done, source = 0, _Source(images)
        try:
            for image in source:
                waiting.append(asyncio.create_task(self.predict(image, **query)))
                if len(waiting) >= concurrency:
                    await asyncio.wait((waiting[0],))
                    yield _own(waiting.popleft().result)
                    done = _tell(progress, done)
            while waiting:
                await asyncio.wait((waiting[0],))
                yield _own(waiting.popleft().result)
                done = _tell(progress, done)
            source.raise_failure()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _talk(self, conversation: Conversation) -> Body:
        step = Step(conversation)
        while not step.is_over:
            if isinstance(step.wanted, float):
                await asyncio.sleep(step.wanted)
                step.go_on(None)
            else:
                with step.catching():
                    step.go_on(await self._http.send(step.wanted))
        return step.body


class _Source:
    """Images up to their end or their failure, which is kept until those before it are answered."""

    def __init__(self, images: Iterable[Image]) -> None:
        self._images = images
        self._failure: Exception | None = None

    def __iter__(self) -> Iterator[Image]:
        try:
            yield from self._images
        except Exception as error:  # noqa: BLE001 - whatever the caller's own generator raises
            self._failure = error

    def raise_failure(self) -> None:
        """Raise what the images ended with, if not with their end."""
        if self._failure is not None:
            raise self._failure


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
