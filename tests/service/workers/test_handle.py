"""How a worker ended is told of that worker alone."""

import asyncio
import os
import signal
import sys

import pytest

from service.cgroup import ControlGroup
from service.workers.handle import Handle
from service.workers.kills import Kills

IDLE = (sys.executable, "-c", "import signal; signal.pause()")


class Group(ControlGroup):
    """A control group in a folder, whose count of kills is what a test says."""

    def killed(self, count: int) -> None:
        (self.root / "memory.events").write_text(f"oom_kill {count}\n")


@pytest.fixture
def group(tmp_path):
    (tmp_path / "cgroup.controllers").touch()
    made = Group(tmp_path, tmp_path / "none")
    made.killed(0)
    return made


def ends_of_two(group, kill) -> list[str]:
    """Return how two workers ended, which `kill` is given and ends."""

    async def scenario():
        kills = Kills(group)
        pair = [await Handle.start(number, str(group.root), kills, IDLE) for number in range(2)]
        await kill(*pair)
        await asyncio.gather(*(one.ended.wait() for one in pair))
        return [one.end for one in pair]

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_kill_for_memory_is_not_told_of_a_worker_that_outlived_it(group):
    async def kill(first, second):
        group.killed(1)
        os.kill(first.process.pid, signal.SIGKILL)
        await first.ended.wait()
        os.kill(second.process.pid, signal.SIGKILL)

    first, second = ends_of_two(group, kill)

    assert "by the kernel, for the memory limit was reached" in first
    assert "not by the kernel for its memory" in second


def test_two_killed_at_once_for_memory_are_both_told_so(group):
    async def kill(*pair):
        group.killed(2)
        for one in pair:
            os.kill(one.process.pid, signal.SIGKILL)
        for one in pair:  # both are dead before the first is reaped
            os.waitid(os.P_PID, one.process.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - it is about to be

    for end in ends_of_two(group, kill):
        assert "by the kernel, for the memory limit was reached" in end


def test_a_kill_by_the_supervisor_has_its_own_reason_and_no_other(group):
    async def kill(first, second):
        group.killed(1)
        first.reason = "it had been silent for 5 s"
        first.kill()
        os.kill(second.process.pid, signal.SIGTERM)

    first, second = ends_of_two(group, kill)

    assert first == "was killed by SIGKILL: it had been silent for 5 s"
    assert second == "was killed by SIGTERM"
