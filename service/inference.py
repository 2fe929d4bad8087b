"""From image bytes to logits, one model at a time, and which models are served. Knows no HTTP.

`Classifier` leads an image through preprocessing, queue and engine; `Service` owns the classifiers' life:
loading → ready → draining, or failed.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.batching import Batcher
from service.config import Settings, cpu_count
from service.engine import Device, OpenEngine, choose_device
from service.errors import (
    DeadlineExceeded,
    FoldserveError,
    InferenceFailed,
    MalformedRequest,
    ModelNotFound,
    NotReady,
    QueueFull,
    ServiceError,
)
from service.metrics import Metrics, ModelMetrics
from service.preprocessing import Accepted, decode, open_formats
from service.repository import Model, Repository

Status = Literal["loading", "ready", "draining", "failed"]
Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]
Outcome = Logits | ServiceError

logger = logging.getLogger(__name__)


class Classifier:
    """One model with its queue."""

    def __init__(
        self,
        model: Model,
        batcher: Batcher[Pixels, Logits],
        decoders: ThreadPoolExecutor,
        accepted: Accepted,
        metrics: ModelMetrics,
    ) -> None:
        self.model = model
        self.metrics = metrics
        self._batcher = batcher
        self._decoders = decoders
        self._accepted = accepted

    def check_room(self) -> None:
        """Raise QueueFull or NotReady when not even one image would be let in: before a body is read for nothing."""
        self._batcher.check_room(1)

    async def classify(self, encoded: Sequence[bytes], *, deadline: float) -> list[Outcome]:
        """Return for each image its logits (classes,), or the error that is its own; the others are not touched by it.

        `deadline` is a time of `time.monotonic`, in seconds. Raises QueueFull or NotReady for all of them.
        """
        with self._batcher.admit(len(encoded)):
            return list(await asyncio.gather(*(self._classify_one(data, deadline) for data in encoded)))

    async def _classify_one(self, encoded: bytes, deadline: float) -> Outcome:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                pixels = await loop.run_in_executor(self._decoders, self._decode, encoded, deadline)
            return await self._batcher.submit(pixels, deadline=deadline)
        except TimeoutError:
            return DeadlineExceeded("the deadline passed before the image was decoded")
        except InferenceFailed as error:
            logger.error("%s: %s", error, error.__cause__)
            return error
        except ServiceError as error:
            return error
        except Exception:  # a lone surprise must neither fail its neighbours nor outlive their admission
            logger.exception("an image failed in a way that nobody foresaw")
            return InferenceFailed("the service failed on this image; its log says why")

    def _decode(self, encoded: bytes, deadline: float) -> Pixels:
        if time.monotonic() >= deadline:  # it waited for a thread until nobody waited for it
            raise DeadlineExceeded("the deadline passed before the image was decoded")
        with self.metrics.timed("decode"):
            return decode(encoded, self.model.manifest.preprocessing, self._accepted)


class Service:
    """The models that are served, and whether they are."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        open_engine: OpenEngine,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.status: Status = "loading"
        self.is_stuck = False  # True when a run outlived the drain: its thread cannot be ended
        self.device: Device | None = None
        self.accepted = Accepted(open_formats(settings.formats), settings.max_image_pixels)
        self._open_engine = open_engine
        self._on_failure = on_failure
        self._classifiers: dict[str, Classifier] = {}
        self._bytes_in_flight = 0
        self._resources = AsyncExitStack()

    @property
    def is_ready(self) -> bool:
        """True while requests are answered."""
        return self.status == "ready"

    async def start(self) -> None:
        """Load every model of the repository; on failure tell `on_failure` and be `failed`."""
        try:
            await self._load_all()
        except Exception as error:
            self._fail(error)
            if not isinstance(error, FoldserveError):
                raise
        else:
            self.status = "ready"
            self.metrics.ready(True)
            served = ", ".join(f"{one.model.name} version {one.model.version}" for one in self._classifiers.values())
            logger.info("ready: serving %s on %s", served, self.device.used if self.device else "?")

    async def stop(self) -> None:
        """Answer what was accepted, then release everything."""
        if self.status != "failed":
            self.status = "draining"
        self.metrics.ready(False)
        try:
            async with asyncio.timeout(self.settings.drain_timeout_s):
                await self._resources.aclose()
        except TimeoutError:
            self.is_stuck = True
            logger.error("a run did not end within %g s; giving it up", self.settings.drain_timeout_s)

    @contextmanager
    def receiving(self, expected_bytes: int) -> Iterator[None]:
        """Hold room for a request body while it arrives. Raises QueueFull when the bodies in arrival are too many."""
        if self._bytes_in_flight + expected_bytes > self.settings.max_bytes_in_flight:
            raise QueueFull("too many request bodies are arriving at once", retry_after_s=1)
        self._bytes_in_flight += expected_bytes
        try:
            yield
        finally:
            self._bytes_in_flight -= expected_bytes

    def models(self) -> list[Model]:
        """Return what is served, by name."""
        return [classifier.model for classifier in self._classifiers.values()]

    def classifier(self, name: str | None = None, version: int | None = None) -> Classifier:
        """Return the classifier of a model, by default the only one or `default_model`.

            Raises NotReady,
        QueueFull, ModelNotFound, or MalformedRequest when a name is needed.
        """
        if not self.is_ready:
            raise NotReady(f"the service is {self.status}", retry_after_s=1)
        name = name or self.settings.default_model
        if name is None and len(self._classifiers) > 1:
            raise MalformedRequest(f"name a model with ?model=…; served are {', '.join(self._classifiers)}")
        found = self._classifiers.get(name) if name else next(iter(self._classifiers.values()))
        if found is None:
            raise ModelNotFound(f"no model {name} is served; served are {', '.join(self._classifiers)}")
        if version is not None and version != found.model.version:
            raise ModelNotFound(f"model {found.model.name} is served in version {found.model.version}, not {version}")
        return found

    async def _load_all(self) -> None:
        settings = self.settings
        self.device = await asyncio.to_thread(choose_device, settings.device)
        self.metrics.device(self.device.requested, self.device.used)
        repository = Repository(settings.models, self._open_engine)
        names = repository.names()
        if settings.default_model is not None and settings.default_model not in names:
            raise ModelNotFound(
                f"default_model {settings.default_model} is not in {settings.models}: {', '.join(names)}"
            )
        decoders = ThreadPoolExecutor(settings.decode_threads or cpu_count(), thread_name_prefix="decode")
        self._resources.push_async_callback(asyncio.to_thread, decoders.shutdown)
        for name in names:
            model = await asyncio.to_thread(repository.load, name, self.device)
            logger.info(
                "loaded %s version %d (%s form, sha256 %s): %d golden images, largest difference %.2g",
                *(
                    model.name,
                    model.version,
                    model.form,
                    model.digest[:12],
                    model.golden_images,
                    model.golden_difference,
                ),
            )
            self._classifiers[name] = await self._open_classifier(model, decoders, self.device)

    async def _open_classifier(self, model: Model, decoders: ThreadPoolExecutor, device: Device) -> Classifier:
        settings = self.settings
        metrics = self.metrics.model(model.name, model.version, model.form, model.digest)
        batcher: Batcher[Pixels, Logits] = Batcher(
            lambda items: list(model.run(np.stack(items))),  # (N, K) → N times (K,)
            observer=metrics,
            max_batch_size=settings.max_batch_size,
            max_queue_size=settings.max_queue_size,
            lanes=settings.lanes or (cpu_count() if device.used == "cpu" else 1),
            max_queue_delay_ms=settings.max_queue_delay_ms,
            on_death=self._fail,
        )
        metrics.depth_from(lambda: batcher.admitted)
        await self._resources.enter_async_context(batcher)
        return Classifier(model, batcher, decoders, self.accepted, metrics)

    def _fail(self, error: BaseException) -> None:
        self.status = "failed"
        self.metrics.ready(False)
        if self._on_failure is not None:
            self._on_failure(error)
