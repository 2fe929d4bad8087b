"""Which models are served, and whether they are: loading → ready → draining, or failed. Knows no HTTP.

Loading a model is all or nothing: every version of its plan is loaded, certified, warmed and checked beside those that
answer; then the plan is switched in one assignment, and what it no longer names is drained. Where anything fails, what
was served is served still.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Literal

from service.artifact import MODEL_NAME, versions
from service.classifier import Classifier
from service.config import Settings, cpu_count
from service.decoding import Decoders
from service.deployment import Deployment, IndexEntry, deploy, index_of
from service.engine import Device, OpenEngine, choose_device
from service.errors import FoldserveError, LoadFailed, MalformedRequest, ModelNotFound, NotReady, QueueFull
from service.metrics import Metrics
from service.opening import Opener
from service.preprocessing import Accepted, open_formats
from service.repository import Model, Repository
from service.rollout import Rollout, read_rollout
from service.watching import Watcher

Status = Literal["loading", "ready", "draining", "failed"]
LAST_RUN_S = 2.0  # the server has waited `drain_timeout_s` for every answer before it stops the service

logger = logging.getLogger(__name__)


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
        self._deployments: dict[str, Deployment] = {}
        self._failures: dict[str, str] = {}  # why the last load of a model failed
        self._changing = asyncio.Lock()  # one load or unload at a time
        self._opener: Opener | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._bytes_in_flight = 0
        self._resources = AsyncExitStack()

    @property
    def receipt_key(self) -> bytes | None:
        """The secret that signs receipts, where one is set."""
        key = self.settings.receipt_key
        return key.get_secret_value().encode() if key is not None and key.get_secret_value() else None

    @property
    def is_degraded(self) -> bool:
        """True when a spot check found other bits than certified and a model runs at its reference shape only."""
        return any(one.runner.is_degraded for deployment in self.deployments() for one in deployment.classifiers())

    def deployments(self) -> list[Deployment]:
        """Return what is served of each model, by name."""
        return list(self._deployments.values())

    def classifiers(self) -> list[Classifier]:
        """Return the stable version of each model that is served, by name."""
        return [deployment.stable for deployment in self.deployments()]

    @property
    def is_ready(self) -> bool:
        """True while requests are answered."""
        return self.status == "ready"

    async def start(self) -> None:
        """Load every model of the repository; on failure tell `on_failure` and be `failed`."""
        watcher = Watcher(self.settings.models) if self.settings.watch_interval_s else None
        try:
            await self._load_all()
        except Exception as error:
            self._fail(error)
            if not isinstance(error, FoldserveError):
                raise
        else:
            self.status = "ready"
            self.metrics.ready(True)
            if watcher is not None:
                self._resources.callback(asyncio.create_task(self._watch(watcher)).cancel)
            served = ", ".join(f"{one.model.name} version {one.model.version}" for one in self.classifiers())
            logger.info("ready: serving %s on %s", served, self.device.used if self.device else "?")

    def begin_drain(self) -> None:
        """Be ready no more; a probe under way ends at its next step."""
        if self.status != "failed":
            self.status = "draining"
        self.metrics.ready(False)

    async def stop(self) -> None:
        """Answer what was accepted, then release everything."""
        self.begin_drain()
        try:
            async with asyncio.timeout(LAST_RUN_S):
                await self._resources.aclose()
        except TimeoutError:
            self.is_stuck = True
            logger.error("a run did not end in time; giving it up")

    @contextmanager
    def receiving(self, expected_bytes: int) -> Iterator[Callable[[int], None]]:
        """Hold room for a request body until it is answered; yields what corrects the size once it is known, in bytes.

        Raises QueueFull when the bodies in hand are too many.
        """
        if self._bytes_in_flight + expected_bytes > self.settings.max_bytes_in_flight:
            raise QueueFull("the request bodies in hand are too many bytes", retry_after_s=1)
        held = expected_bytes
        self._bytes_in_flight += held

        def correct(actual_bytes: int) -> None:
            nonlocal held
            self._bytes_in_flight += actual_bytes - held
            held = actual_bytes

        try:
            yield correct
        finally:
            self._bytes_in_flight -= held

    def models(self) -> list[Model]:
        """Return what is served, by name, each in its stable version."""
        return [classifier.model for classifier in self.classifiers()]

    def deployment(self, name: str | None = None) -> Deployment:
        """Return what is served of a model, by default of the only one or of `default_model`.

        Raises NotReady, ModelNotFound, or MalformedRequest when a name is needed.
        """
        if not self.is_ready:
            raise NotReady(f"the service is {self.status}", retry_after_s=1)
        name = name or self.settings.default_model
        if name is None and len(self._deployments) > 1:
            raise MalformedRequest(f"name a model with ?model=…; served are {', '.join(self._deployments)}")
        found = self._deployments.get(name) if name else next(iter(self._deployments.values()), None)
        if found is None:
            served = ", ".join(self._deployments) or "none"
            raise ModelNotFound(f"no model {name or ''} is served; served are {served}")
        return found

    def classifier(self, name: str | None = None, version: int | None = None) -> Classifier:
        """Return the classifier of a model's version, by default of the stable one: to look at; to ask it, `lease`.

        Raises as `deployment`, and ModelNotFound for a version that is not loaded.
        """
        return self.deployment(name).opened(version).classifier

    @contextmanager
    def lease(
        self, name: str | None = None, version: int | None = None, *, request_id: str = ""
    ) -> Iterator[Classifier]:
        """Lend the classifier that answers a request, and keep it open until it has.

        Without a version it is the stable one, or for its share of the ids the canary. Raises as `classifier`.
        """
        deployment = self.deployment(name)
        opened = deployment.opened(version if version is not None else deployment.plan.choose(request_id))
        opened.take()
        try:
            yield opened.classifier
        finally:
            opened.let_go()

    async def load(self, name: str, version: int | None = None, rollout: Rollout | None = None) -> None:
        """Bring a model to what its serving.json says, or `rollout`; with a `version`, that one becomes stable.

        Raises ModelNotFound, NotReady, or LoadFailed; then what was served is served still.
        """
        async with self._changing:
            if self._opener is None or self.status in {"draining", "failed"}:
                raise NotReady(f"the service is {self.status}", retry_after_s=1)
            try:
                await self._bring(name, version, rollout)
            except FoldserveError as error:
                if isinstance(error, ModelNotFound):
                    raise
                self._failures[name] = str(error)
                served = self._deployments.get(name)
                kept = f"; version {served.plan.stable} is served still" if served else ""
                logger.error("model %s could not be loaded: %s%s", name, error, kept)
                raise LoadFailed(f"model {name} could not be loaded: {error}{kept}") from error

    async def unload(self, name: str) -> None:
        """Serve a model no more; what was accepted is answered. Raises ModelNotFound where it is not served."""
        async with self._changing:
            if name not in self._deployments:
                raise ModelNotFound(f"no model {name} is served; served are {', '.join(self._deployments) or 'none'}")
            self._retire(self._deployments.pop(name), keep=frozenset())
            logger.info("unloaded %s", name)

    def index(self) -> list[IndexEntry]:
        """Return every version of every model that is in the repository or served, by name and version."""
        return index_of(self.settings.models, self._deployments, self._failures)

    async def _watch(self, watcher: Watcher) -> None:
        """Load what appears in the repository or changes there, and unload what goes, until cancelled."""
        while True:
            await asyncio.sleep(self.settings.watch_interval_s)
            try:
                for name, is_there in await asyncio.to_thread(watcher.changes):
                    await self._follow(name, is_there=is_there)
            except OSError as error:
                logger.warning("the repository cannot be looked at: %s", error)

    async def _follow(self, name: str, *, is_there: bool) -> None:
        try:
            if is_there:
                await self.load(name)
            elif name in self._deployments:
                await self.unload(name)
        except FoldserveError as error:  # logged already, and kept for the index
            logger.debug("watching goes on: %s", error)

    async def _bring(self, name: str, version: int | None, rollout: Rollout | None) -> None:
        assert self._opener is not None
        folder = self.settings.models / name
        present = versions(folder) if MODEL_NAME.fullmatch(name) else []
        if not present:
            raise ModelNotFound(f"the repository has no model {name[:100]}")
        asked = rollout or read_rollout(folder)
        if version is not None:
            asked = asked.model_copy(update={"stable": version})
        plan = asked.plan(present)
        old = self._deployments.get(name)
        new = await deploy(name, plan, folder, self._opener, old)
        if self.status in {"draining", "failed"}:
            self._retire(new, keep=frozenset(map(id, old.all_opened() if old else ())))
            raise NotReady("shutting down", retry_after_s=1)
        self._deployments = dict(sorted({**self._deployments, name: new}.items()))
        self._failures.pop(name, None)
        if old is not None:
            self._retire(old, keep=frozenset(map(id, new.all_opened())))

    def _retire(self, deployment: Deployment, keep: frozenset[int]) -> None:
        task = asyncio.create_task(deployment.retire(keep))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _load_all(self) -> None:
        settings = self.settings
        self.device = await asyncio.to_thread(choose_device, settings.device)
        self.metrics.device(self.device.requested, self.device.used)
        repository = Repository(settings.models, self._open_engine, settings.form)
        names = repository.names()
        if settings.default_model is not None and settings.default_model not in names:
            raise ModelNotFound(
                f"default_model {settings.default_model} is not in {settings.models}: {', '.join(names)}"
            )
        decoders = Decoders(settings.decode_threads or cpu_count(), settings.max_pixels_in_flight)
        self._resources.callback(decoders.shutdown)
        self._resources.push_async_callback(self._close_all)
        self._opener = Opener(
            settings,
            repository,
            self.device,
            decoders,
            self.accepted,
            self.metrics,
            is_ending=lambda: self.status in {"draining", "failed"},
            on_death=self._fail,
        )
        async with self._changing:
            for name in names:
                await self._bring(name, None, None)

    async def _close_all(self) -> None:
        await asyncio.gather(*(deployment.close() for deployment in self.deployments()), *self._retiring)

    def _fail(self, error: BaseException) -> None:
        self.status = "failed"
        self.metrics.ready(False)
        if self._on_failure is not None:
            self._on_failure(error)
