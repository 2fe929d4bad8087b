"""Looks at the repository's folders for what changed. Knows no model and no service.

A change counts once two looks in a row have seen the same files, of equal size and time: what is still being written
is not touched. One that is tried and fails is tried again when its files change again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

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

    @property
    def known(self) -> dict[str, Snapshot]:
        """What was there, of each model, when it was last loaded, tried, or counted as known."""
        return dict(self._known)

    def resume(self, known: Mapping[str, Any]) -> None:
        """Go on from what another watcher knew, as JSON gives it back."""
        self._known = {name: _as_tuples(snapshot) for name, snapshot in known.items()}

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


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


async def watch(
    watcher: Watcher,
    interval_s: float,
    follow: Callable[[str, bool], Awaitable[None]],
    remember: Callable[[Mapping[str, Snapshot]], Awaitable[None]],
) -> None:
    """Tell `follow` each model that changed, by name, and whether it is still there; until cancelled.

    Once all are followed, `remember` is told what is known then.
    """
    while True:
        await asyncio.sleep(interval_s)
        try:
            changes = await asyncio.to_thread(watcher.changes)
            for name, is_there in changes:
                await follow(name, is_there)
            if changes:
                await remember(watcher.known)
        except OSError as error:
            logger.warning("the repository cannot be looked at: %s", error)
