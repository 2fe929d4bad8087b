"""What the kernel's control group allows this process: time on the processor, memory; and how often memory ran out.

Reads versions 1 and 2, in a container and outside one. A group's limit holds for all groups below it, so the tightest
on the way up counts (cgroups(7); the kernel's Documentation/admin-guide/cgroup-v2.rst). Knows no settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NO_LIMIT = 2**60  # version 1 writes the largest number of whole pages where there is none


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory limit and what is in use under it, bytes. Not counted: file pages that nobody looked at lately."""

    limit: int
    used: int


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """The group that this process is in, as the kernel's files tell."""

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def cpu_quota(self) -> float | None:
        """Return the processor time that is allowed, in processors, or None where there is no limit."""
        quotas = [_quota_of(folder) for folder in self._folders("cpu")]
        return min((quota for quota in quotas if quota is not None), default=None)

    def memory(self) -> Memory | None:
        """Return the limit that is nearest to being reached, or None where there is none."""
        known = [memory for folder in self._folders("memory") if (memory := _memory_of(folder)) is not None]
        return min(known, key=lambda memory: memory.limit - memory.used, default=None)

    def out_of_memory_kills(self) -> int | None:
        """Return how many processes of this group the kernel killed for their memory; None where it does not say."""
        own = next(self._folders("memory"), None)
        if own is None:
            return None
        for name in ("memory.events", "memory.oom_control"):
            kills = _table(own / name).get("oom_kill")
            if kills is not None:
                return kills
        return None

    def _folders(self, controller: str) -> Iterator[Path]:
        """Yield the folders of this process's group and of those above it, the own one first."""
        is_version_2 = (self.root / "cgroup.controllers").exists()
        top = self.root if is_version_2 else self.root / controller
        own = top / self._path("" if is_version_2 else controller)
        ways_up = [own, *own.parents]
        # In a container its group is mounted as the top, while the path may be the host's.
        yield from (folder for folder in ways_up[: ways_up.index(top) + 1] if folder.is_dir())

    def _path(self, controller: str) -> str:
        for line in _read(self.membership).splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(",") and ".." not in path:
                return path.strip("/")
        return ""


def _quota_of(folder: Path) -> float | None:
    text = _read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
    quota, period = _numbers(text, 2)
    return None if quota is None or period is None or quota <= 0 or period <= 0 else quota / period


def _memory_of(folder: Path) -> Memory | None:
    (limit,) = _numbers(_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes"), 1)
    (used,) = _numbers(_read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes"), 1)
    if limit is None or used is None or limit >= NO_LIMIT:
        return None
    statistics = _table(folder / "memory.stat")
    idle = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
    return Memory(limit, max(0, used - idle))


def _numbers(text: str, count: int) -> tuple[int | None, ...]:
    """Return `count` numbers, each None where it is missing or a word such as `max`."""
    words = [*text.split(), *[""] * count][:count]
    return tuple(int(word) if word.lstrip("-").isdecimal() else None for word in words)


def _table(path: Path) -> dict[str, int]:
    """Return the lines `name number` of a file."""
    lines = (line.split() for line in _read(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdecimal()}


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
