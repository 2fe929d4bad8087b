"""Which worker the kernel killed for its memory. Its count says how many of the control group, and not which."""

import subprocess

from service.cgroup import ControlGroup
from service.memory import cause_of_kill


class Kills:
    """The kernel's count as each living worker last knew it: at its start, or at the last death that it outlived."""

    def __init__(self, group: ControlGroup) -> None:
        self._group = group
        self._counts: dict[subprocess.Popen[bytes], int | None] = {}

    def started(self, process: subprocess.Popen[bytes]) -> None:
        """Note a worker's start."""
        self._counts[process] = self._group.out_of_memory_kills()

    def cause(self, process: subprocess.Popen[bytes]) -> str:
        """Return what to add to "was killed by SIGKILL" of a worker that has ended; to be asked once for each."""
        count = self._group.out_of_memory_kills()
        cause = cause_of_kill(self._counts.pop(process), count)
        for other in self._counts:
            if other.poll() is None:  # one that has ended too, and is about to be reaped, may have been killed with it
                self._counts[other] = count
        return cause
