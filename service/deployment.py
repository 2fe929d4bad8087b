"""What is served of one model: its plan, the versions that are open, and its shadow at work."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from service.artifact import MODEL_NAME, versions
from service.classifier import Classifier
from service.errors import ModelNotFound
from service.opening import Opened, Opener
from service.rollout import Plan, stamp_of
from service.shadow import Shadow


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One version in the repository; `reason` says why it is not ready, or why its model's last load failed."""

    name: str
    version: int
    is_ready: bool
    reason: str


class Deployment:
    """One model as it is served; replaced as a whole, never changed."""

    def __init__(self, name: str, plan: Plan, opened: dict[int, Opened], shadow: Shadow | None) -> None:
        self.name = name
        self.plan = plan
        self.shadow = shadow
        self._opened = opened

    @property
    def stable(self) -> Classifier:
        """The version that answers unless another is asked for or chosen."""
        return self._opened[self.plan.stable].classifier

    def opened(self, version: int | None = None) -> Opened:
        """Return a version that is loaded, by default the stable one. Raises ModelNotFound."""
        found = self._opened.get(self.plan.stable if version is None else version)
        if found is None:
            loaded = ", ".join(map(str, sorted(self._opened)))
            raise ModelNotFound(f"model {self.name} is served in version {loaded}, not {version}")
        return found

    def all_opened(self) -> list[Opened]:
        """Return every version that is loaded."""
        return list(self._opened.values())

    def classifiers(self) -> list[Classifier]:
        """Return every version that is loaded, ready to be asked."""
        return [opened.classifier for opened in self._opened.values()]

    async def retire(self, keep: frozenset[int]) -> None:
        """Drain what is not kept, by its `id`: each once nobody holds it any more."""
        await self._end_shadow()
        await asyncio.gather(*(one.retire() for one in self._opened.values() if id(one) not in keep))

    async def close(self) -> None:
        """Answer what was let in, release everything."""
        await self._end_shadow()
        await asyncio.gather(*(one.close() for one in self._opened.values()))

    async def _end_shadow(self) -> None:
        if self.shadow is not None:
            await self.shadow.__aexit__()


async def deploy(name: str, plan: Plan, folder: Path, opener: Opener, old: Deployment | None) -> Deployment:
    """Open what the plan names and `old` has not, and return what is then served; nothing is left of a failure.

    Raises as `Opener.open`.
    """
    before = {} if old is None else {one.classifier.model.version: one for one in old.all_opened()}
    opened: dict[int, Opened] = {}
    async with AsyncExitStack() as undo:
        for version in sorted(plan.versions):
            lanes = 1 if version == plan.shadow else None  # a shadow gives way to those who answer
            stamp, kept = (stamp_of(folder / str(version)), lanes), before.get(version)
            if kept is not None and kept.stamp == stamp:
                opened[version] = kept
                continue
            opened[version] = await opener.open(name, version, stamp=stamp, lanes=lanes)
            undo.push_async_callback(opened[version].retire)
        undo.pop_all()
    return Deployment(name, plan, opened, await _cast(plan, opened))


async def _cast(plan: Plan, opened: dict[int, Opened]) -> Shadow | None:
    """Set the shadow to work beside the stable version, and let no other listen."""
    for one in opened.values():
        one.classifier.on_answer = None
    if plan.shadow is None:
        return None
    stable, other = opened[plan.stable].classifier, opened[plan.shadow].classifier
    shadow = Shadow(stable, other, stable.metrics, lambda: stable.is_busy)
    await shadow.__aenter__()
    stable.on_answer = shadow.offer
    return shadow


def index_of(root: Path, deployments: Mapping[str, Deployment], failures: Mapping[str, str]) -> list[IndexEntry]:
    """Return every version of every model that is below `root` or served, by name and version."""
    on_disk = [one.name for one in root.iterdir() if MODEL_NAME.fullmatch(one.name)] if root.is_dir() else []
    rows = []
    for name in sorted({*on_disk, *deployments}):
        loaded = deployments[name].plan.versions if name in deployments else frozenset[int]()
        for version in sorted({*versions(root / name), *loaded}):
            failure = f"the last load failed: {failures[name]}" if name in failures else ""
            is_ready = version in loaded
            rows.append(IndexEntry(name, version, is_ready, failure or ("" if is_ready else "not loaded")))
    return rows
