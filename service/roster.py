"""The models that are served, and how one comes and goes: a plan is switched in one assignment. Knows no crew, no HTTP.

Whoever changes a roster sees to it that nobody else does at the same time.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from service.artifact import MODEL_NAME, versions
from service.deployment import Deployment, IndexEntry, deploy, index_of
from service.errors import FoldserveError, LoadFailed, ModelNotFound, NotReady
from service.opening import Opener
from service.rollout import Rollout, read_rollout

logger = logging.getLogger(__name__)


class Roster:
    """What is deployed of each model of the repository at `root`."""

    def __init__(self, root: Path, is_ending: Callable[[], bool]) -> None:
        self._root = root
        self._is_ending = is_ending
        self._deployments: dict[str, Deployment] = {}
        self.failures: dict[str, str] = {}  # why the last load of a model failed
        self._retiring: set[asyncio.Task[None]] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._deployments

    def __len__(self) -> int:
        return len(self._deployments)

    @property
    def names(self) -> str:
        """The models that are served, for messages."""
        return ", ".join(self._deployments) or "none"

    def all(self) -> list[Deployment]:
        """Return what is served of each model, by name."""
        return list(self._deployments.values())

    def find(self, name: str | None) -> Deployment | None:
        """Return what is served of a model, by default of the first."""
        return self._deployments.get(name) if name else next(iter(self._deployments.values()), None)

    def note_failure(self, name: str, reason: str | None) -> None:
        """Keep for the index why a load failed, in this process or another; None: the last one did not."""
        if reason is None:
            self.failures.pop(name, None)
        else:
            self.failures[name] = reason

    def index(self) -> list[IndexEntry]:
        """Return every version of every model that is in the repository or served, by name and version."""
        return index_of(self._root, self._deployments, self.failures)

    async def load(self, name: str, version: int | None, rollout: Rollout | None, opener: Opener) -> Deployment:
        """Bring a model as `bring`, and keep the reason of a failure for the index.

        Raises ModelNotFound, or LoadFailed; then what was served is served still.
        """
        try:
            return await self.bring(name, version, rollout, opener)
        except ModelNotFound:
            raise
        except FoldserveError as error:
            self.failures[name] = str(error)
            served = self._deployments.get(name)
            kept = f"; version {served.plan.stable} is served still" if served else ""
            logger.error("model %s could not be loaded: %s%s", name, error, kept)
            raise LoadFailed(f"model {name} could not be loaded: {error}{kept}") from error

    async def bring(self, name: str, version: int | None, rollout: Rollout | None, opener: Opener) -> Deployment:
        """Serve a model as its serving.json says, but for what `rollout` names; with a `version`, that one is stable.

        Raises ModelNotFound, NotReady where the service ends meanwhile, and as `deploy`.
        """
        folder = self._root / name
        present = versions(folder) if MODEL_NAME.fullmatch(name) else []
        if not present:
            raise ModelNotFound(f"the repository has no model {name[:100]}")
        asked = rollout if rollout is not None and rollout.is_complete else read_rollout(folder)
        asked = asked if rollout is None else rollout.over(asked)
        if version is not None:
            asked = asked.model_copy(update={"stable": version})
        old = self._deployments.get(name)
        new = await deploy(name, asked.plan(present), folder, opener, old)
        if self._is_ending():
            self._retire(new, keep=frozenset(map(id, old.all_opened() if old else ())))
            raise NotReady("shutting down", retry_after_s=1)
        self._deployments = dict(sorted({**self._deployments, name: new}.items()))
        self.failures.pop(name, None)
        if old is not None:
            self._retire(old, keep=frozenset(map(id, new.all_opened())))
        return new

    def remove(self, name: str) -> None:
        """Serve a model no more; what was accepted is answered. Raises ModelNotFound where it is not served."""
        if name not in self._deployments:
            raise ModelNotFound(f"no model {name} is served; served are {self.names}")
        self.failures.pop(name, None)
        self._retire(self._deployments.pop(name), keep=frozenset())

    async def close(self) -> None:
        """Answer what was let in, release everything."""
        await asyncio.gather(*(deployment.close() for deployment in self.all()), *self._retiring)

    def _retire(self, deployment: Deployment, keep: frozenset[int]) -> None:
        task = asyncio.create_task(deployment.retire(keep))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
