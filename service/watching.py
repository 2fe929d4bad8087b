"""Looks at the repository's folders for what changed. Knows no model and no service.

A change counts once two looks in a row have seen the same files, of equal size and time: what is still being written
is not touched. One that is tried and fails is tried again when its files change again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from service.artifact import MODEL_NAME, versions
from service.rollout import Snapshot, snapshot_of

logger = logging.getLogger(__name__)


class Watcher:
    """Remembers what it saw; what is there when it is made counts as known."""

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            self._known = self._look()
        except OSError:  # who loads from there says so
            self._known = {}
        self._last = self._known

    def changes(self) -> list[tuple[str, bool]]:
        """Return the models that changed and have settled since, by name, each with whether it is still there."""
        seen = self._look()
        settled = [
            name
            for name in sorted({*self._known, *seen})
            if seen.get(name) == self._last.get(name) != self._known.get(name)
        ]
        self._last = seen
        for name in settled:
            if name in seen:
                self._known[name] = seen[name]
            else:
                self._known.pop(name, None)
        return [(name, name in seen) for name in settled]

    def _look(self) -> dict[str, Snapshot]:
        if not self._root.is_dir():
            return {}
        folders = [one for one in self._root.iterdir() if MODEL_NAME.fullmatch(one.name) and versions(one)]
        return {folder.name: snapshot_of(folder) for folder in folders}


async def watch(watcher: Watcher, interval_s: float, follow: Callable[[str, bool], Awaitable[None]]) -> None:
    """Tell `follow` each model that changed, by name, and whether it is still there; until cancelled."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            for name, is_there in await asyncio.to_thread(watcher.changes):
                await follow(name, is_there)
        except OSError as error:
            logger.warning("the repository cannot be looked at: %s", error)
