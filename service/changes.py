"""Loads and unloads while the service answers: one at a time, and in every process of the crew. No HTTP."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from service.crew import Crew
from service.deployment import Deployment
from service.errors import FoldserveError, NotReady
from service.opening import Opener
from service.rollout import Rollout, Snapshot
from service.roster import Roster
from service.watching import Watcher, watch

logger = logging.getLogger(__name__)


class Changes:
    """What changes a roster. `on_loaded` is told after each load, for what is in use has grown."""

    def __init__(
        self, crew: Crew, roster: Roster, is_ending: Callable[[], bool], on_loaded: Callable[[], None]
    ) -> None:
        self._crew = crew
        self._roster = roster
        self._is_ending = is_ending
        self._on_loaded = on_loaded
        self._opener: Opener | None = None
        self._one_by_one = asyncio.Lock()
        self._seen: Mapping[str, Any] = {}  # what whoever watches the repository has followed
        crew.on("load", self._load)
        crew.on("unload", self._unload)
        crew.on("note failure", self._note_failure)
        crew.on("note seen", self._note_seen)

    async def begin(self, opener: Opener, names: Iterable[str], told: Mapping[str, Rollout]) -> None:
        """Bring the first models, as their serving.json or `told` says; what comes later waits. Raises as `bring`."""
        self._opener = opener
        async with self._one_by_one:
            for name in names:
                await self._roster.bring(name, None, told.get(name), opener)

    async def load(self, name: str, version: int | None = None, rollout: Rollout | None = None) -> None:
        """Bring a model to what its serving.json says, but for what `rollout` names; with a `version`, that is stable.

        So does every process of the crew, once it has succeeded in this one.
        Raises ModelNotFound, NotReady, or LoadFailed; then what was served is served still.
        """
        asked = None if rollout is None else rollout.model_dump(mode="json", exclude_unset=True)
        await self._tell_all("load", {"name": name, "version": version, "rollout": asked})

    async def unload(self, name: str) -> None:
        """Serve a model no more, in no process; what was accepted is answered.

        Raises ModelNotFound where it is not served.
        """
        await self._tell_all("unload", {"name": name})

    async def agree(self) -> None:
        """Where a file was changed in place since the others loaded it, have all load what this process has."""
        for order in self._crew.loaded or ():
            found, theirs = self._roster.find(order["name"]), order["digests"]
            if found is not None and any(theirs.get(one, ours) != ours for one, ours in _digests(found).items()):
                logger.warning("model %s: a version that is served was changed in place; all load it anew", found.name)
                await self.load(found.name, rollout=Rollout.of(found.plan))

    async def watch(self, watcher: Watcher, interval_s: float) -> None:
        """Follow what the repository shows, from where a process before this one left off; until cancelled."""
        if self._seen:
            watcher.resume(self._seen)
        else:
            await self._remember(watcher.known)
        await watch(watcher, interval_s, self._follow, self._remember)

    async def _remember(self, known: Mapping[str, Snapshot]) -> None:
        await self._crew.tell_all("note seen", {"known": dict(known)}, kept_as="seen")

    async def _note_seen(self, order: Mapping[str, Any]) -> None:
        self._seen = order["known"]

    async def _follow(self, name: str, is_there: bool) -> None:  # noqa: FBT001
        """Load a model that has changed on disk, or unload one that went from there."""
        try:
            if is_there:
                await self.load(name)
            elif name in self._roster:
                await self.unload(name)
        except FoldserveError as error:  # logged already, and kept for the index
            logger.debug("watching goes on: %s", error)

    async def _tell_all(self, what: str, order: Mapping[str, Any]) -> None:
        """Have all carry out an order, and then know whether the model's last load failed. Raises what it raises."""
        name = order["name"]
        try:
            await self._crew.tell_all(what, order, kept_as=f"model {name}")
        finally:
            note = {"name": name, "reason": self._roster.failures.get(name)}
            await self._crew.tell_all("note failure", note, kept_as=f"failure of {name}")

    async def _load(self, order: Mapping[str, Any]) -> dict[str, Any]:
        rollout = None if order["rollout"] is None else Rollout.model_validate(order["rollout"])
        async with self._one_by_one:
            if self._opener is None or self._is_ending():
                raise NotReady(f"the service is {'draining' if self._is_ending() else 'loading'}", retry_after_s=1)
            deployment = await self._roster.load(order["name"], order["version"], rollout, self._opener)
        self._on_loaded()
        return loaded(deployment)

    async def _unload(self, order: Mapping[str, Any]) -> None:
        async with self._one_by_one:
            self._roster.remove(order["name"])
            logger.info("unloaded %s", order["name"])

    async def _note_failure(self, order: Mapping[str, Any]) -> None:
        self._roster.note_failure(order["name"], order["reason"])


def loaded(deployment: Deployment) -> dict[str, Any]:
    """Return what the rest of the crew needs to serve the very same: the plan as it came out, and certificates."""
    made = [one.certificate for one in deployment.classifiers() if one.certificate is not None]
    rollout = Rollout.of(deployment.plan).model_dump(mode="json")
    order = {"name": deployment.name, "version": None, "rollout": rollout, "digests": _digests(deployment)}
    return {"order": order, "certificates": [one.model_dump(mode="json") for one in made]}


def _digests(deployment: Deployment) -> dict[str, str]:
    return {f"{one.model.version} {one.model.form}": one.model.digest for one in deployment.classifiers()}
