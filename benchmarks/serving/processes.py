"""What a process and all its children cost: CPU time and proportional memory, as Linux counts them."""

import contextlib
import os
import signal
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """Return a process and all that it has started, directly or not, that still live."""
    children = [child for task in Path(f"/proc/{pid}/task").glob("*") for child in _children(task)]
    return [pid, *(one for child in children for one in tree(child))]


def _children(task: Path) -> list[int]:
    try:
        return [int(one) for one in (task / "children").read_text().split()]
    except OSError:  # it has ended meanwhile
        return []


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process tree, user and system, seconds (proc(5): utime, stime and those of the dead)."""
    fields = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in tree(pid)]
    return sum(int(number) for one in fields for number in one[11:15]) / TICKS_PER_S


def proportional_mb(pid: int) -> float:
    """Return the memory of a process tree, MB, a page shared by n processes counted as 1/n for each (PSS)."""
    rollups = [Path(f"/proc/{one}/smaps_rollup").read_text() for one in tree(pid)]
    return sum(int(text.partition("\nPss:")[2].split()[0]) for text in rollups) / 1000


def kill_tree(pid: int) -> None:
    """End whatever is left of a session that was started with `start_new_session`."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
