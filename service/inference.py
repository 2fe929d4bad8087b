"""Which models are served, and whether they are: loading → ready → retiring → draining, or failed. No HTTP.

Loading a model is all or nothing: every version of its plan is loaded, certified, warmed and checked beside those that
answer; then the plan is switched in one assignment, and what it no longer names is drained. Where anything fails, what
was served is served still.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, Literal

from service.cgroup import ControlGroup
from service.changes import Changes, loaded
from service.classifier import Classifier
from service.config import Settings
from service.crew import Crew
from service.decoding import Decoders
from service.deployment import Deployment, IndexEntry
from service.engine import Device, OpenEngine, choose_device
from service.errors import EngineLost, FoldserveError, MalformedRequest, ModelNotFound, NotReady
from service.memory import check_after_loading, release_free_memory
from service.metrics import Metrics
from service.opening import Opened, Opener, degrade
from service.preprocessing import Accepted, open_formats, refuse_warnings
from service.repository import Model, Repository
from service.rollout import Rollout
from service.room import Room
from service.roster import Roster
from service.watching import Watcher

Status = Literal["loading", "ready", "retiring", "draining", "failed"]
WATCH_EVERY_S = 0.5
LAST_RUN_S = 2.0  # the server has waited `drain_timeout_s` for every answer before it stops the service

logger = logging.getLogger(__name__)


class Service:
    """The models that are served, and whether they are."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        open_engine: OpenEngine,
        on_failure: Callable[[BaseException], None] | None,
        crew: Crew,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.status: Status = "loading"
        self.is_stuck = False  # True when a run outlived the drain: its thread cannot be ended
        self.device: Device | None = None
        refuse_warnings()
        self.accepted = Accepted(open_formats(settings.formats), settings.max_image_pixels)
        self.crew = crew
        crew.on("degrade", self._degrade)
        crew.on("refresh metrics", self._refresh_metrics)
        self._open_engine = open_engine
        self._on_failure = on_failure
        self._roster = Roster(settings.models, self._is_ending)
        self.changes = Changes(crew, self._roster, self._is_ending, self._check_memory)
        self.receiving = Room(settings.bytes_share).hold
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
        return self._roster.all()

    def classifiers(self) -> list[Classifier]:
        """Return the stable version of each model that is served, by name."""
        return [deployment.stable for deployment in self.deployments()]

    @property
    def is_ready(self) -> bool:
        """True while requests should come; with others, once all were ready and while one is."""
        view = self.crew.view
        return self.status == "ready" and (view is None or view.is_ready)

    @property
    def is_answering(self) -> bool:
        """True while requests are answered: also after SIGTERM, while some still come."""
        return self.status in {"ready", "retiring"}

    async def start(self) -> None:
        """Load every model of the repository; on failure tell `on_failure` and be `failed`."""
        interval_s = self.settings.watch_interval_s
        is_watching = interval_s and not self.crew.number  # one looks, and tells the others
        watcher = Watcher(self.settings.models) if is_watching else None
        try:
            await self._load_all()
            await self.changes.agree()
            await self.crew.joined([loaded(one) for one in self.deployments()])
        except Exception as error:
            if isinstance(error, NotReady) and self.status == "draining":
                return  # told to end while it was loading, which is no failure
            self._fail(error)
            if not isinstance(error, FoldserveError):
                raise
        else:
            self.status = "ready"
            self.metrics.ready(True)
            if watcher is not None:
                self._resources.callback(asyncio.create_task(self.changes.watch(watcher, interval_s)).cancel)
            served = ", ".join(f"{one.model.name} version {one.model.version}" for one in self.classifiers())
            logger.info("ready: serving %s on %s", served, self.device.used if self.device else "?")
            self._check_memory()

    async def watch_runs(self) -> None:
        """Fail when a run takes so long that its thread must hang; runs until cancelled."""
        limit_s = self.settings.run_timeout_s
        while self.status != "failed":
            await asyncio.sleep(WATCH_EVERY_S)
            opened = [one for deployment in self.deployments() for one in deployment.classifiers()]
            if hanging := [one.model.name for one in opened if one.runner.longest_run_s > limit_s]:
                self.is_stuck = True
                self._fail(EngineLost(f"a run of model {hanging[0]} hangs: it has taken more than {limit_s:g} s"))

    def retire(self) -> None:
        """Be ready no more, while what still arrives is answered."""
        if self.status in {"loading", "ready"}:
            self.status = "retiring" if self.status == "ready" else "draining"
        self.metrics.ready(False)

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
        self.metrics.refresh()  # other processes tell of what this one counted

    def models(self) -> list[Model]:
        """Return what is served, by name, each in its stable version."""
        return [classifier.model for classifier in self.classifiers()]

    def deployment(self, name: str | None = None) -> Deployment:
        """Return what is served of a model, by default of the only one or of `default_model`.

        Raises NotReady, ModelNotFound, or MalformedRequest when a name is needed.
        """
        if not self.is_answering:
            raise NotReady(f"the service is {self.status}", retry_after_s=1)
        name = name or self.settings.default_model
        if name is None and len(self._roster) > 1:
            raise MalformedRequest(f"name a model with ?model=…; served are {self._roster.names}")
        found = self._roster.find(name)
        if found is None:
            raise ModelNotFound(f"no model {name or ''} is served; served are {self._roster.names}")
        return found

    def classifier(self, name: str | None = None, version: int | None = None) -> Classifier:
        """Return the classifier of a model's version, by default of the stable one: to look at; to ask it, `lease`.

        Raises as `deployment`, and ModelNotFound for a version that is not loaded.
        """
        return self.deployment(name).opened(version).classifier

    def lease(self, name: str | None = None, version: int | None = None, *, request_id: str = "") -> Opened:
        """Return what answers a request; as a context it gives its classifier, and keeps it open until it has.

        Without a version it is the stable one, or for its share of the ids the canary. Raises as `classifier`.
        """
        deployment = self.deployment(name)
        return deployment.opened(version if version is not None else deployment.plan.choose(request_id))

    def index(self) -> list[IndexEntry]:
        """Return every version of every model that is in the repository or served, by name and version."""
        return self._roster.index()

    async def _load_all(self) -> None:
        settings = self.settings
        self.device = await asyncio.to_thread(choose_device, settings.device)
        self.metrics.device(self.device.requested, self.device.used)
        repository = Repository(settings.models, self._open_engine, settings.form)
        told = {order["name"]: Rollout.model_validate(order["rollout"]) for order in self.crew.loaded or ()}
        names = repository.names() if self.crew.loaded is None else sorted(told)
        if settings.default_model is not None and settings.default_model not in names:
            raise ModelNotFound(
                f"default_model {settings.default_model} is not in {settings.models}: {', '.join(names)}"
            )
        decoders = Decoders(settings.decode_threads or settings.cores_share, settings.pixels_share)
        self._resources.callback(decoders.shutdown)
        self._resources.push_async_callback(self._roster.close)
        opener = Opener(
            settings,
            repository,
            self.device,
            decoders,
            self.accepted,
            self.metrics,
            crew=self.crew,
            is_ending=self._is_ending,
            on_death=self._fail,
        )
        await self.changes.begin(opener, names, told)

    async def _degrade(self, order: Mapping[str, Any]) -> None:
        deployment = self._roster.find(order["model"])
        for one in deployment.classifiers() if deployment is not None else ():
            if one.model.version == order["version"]:
                degrade(one.model, one.runner, one.metrics, is_refuted=order["is_refuted"])

    def _check_memory(self) -> None:
        release_free_memory()
        if self.crew.number is None:  # of several processes, the supervisor looks at the sum
            check_after_loading(self.settings, ControlGroup())

    def _is_ending(self) -> bool:
        return self.status in {"draining", "failed"}

    async def refresh_metrics(self) -> None:
        """Bring up to date, in every process, what is read only when somebody asks."""
        await self.crew.tell_all("refresh metrics", {})

    async def _refresh_metrics(self, _: Mapping[str, Any]) -> None:
        self.metrics.refresh()

    def _fail(self, error: BaseException) -> None:
        if self.status == "failed":
            return
        self.status = "failed"
        logger.error("the service failed: %s", error)
        self.crew.leave(str(error))
        self.metrics.ready(False)
        if self._on_failure is not None:
            self._on_failure(error)
