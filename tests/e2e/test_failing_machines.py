"""What the machine does to a service: no descriptors, no disk, a clock that jumps. It is degraded, not dead."""

import resource
import socket
from pathlib import Path

import httpx
import pytest
from e2e_support import DEMO, IMAGE, PLAIN, add_key, counted, post, wait_for, workers_of

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_process_out_of_descriptors_answers_again_once_it_has_some(start, workers):
    server = start(*PLAIN[:2], "--workers", workers, "--grace-s", "0", "--max-connections", "100000")
    pids = [server.process.pid, *workers_of(server)]
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids}
    try:
        for pid in pids:
            used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 3, limits[pid][1]))
        address = httpx.URL(server.url)
        idle = [socket.create_connection((address.host, address.port)) for _ in range(40)]
        wait_for(lambda: "no connection can be accepted" in server.said(), "the descriptors have run out")
        assert server.process.poll() is None
        for connection in idle:
            connection.close()
    finally:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits[pid])

    wait_for(lambda: answers(server), "it answers again")
    assert workers_of(server) == pids[1:], "no worker died of it"


def answers(server) -> bool:
    try:
        return post(server.url, IMAGE, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def test_a_full_disk_for_the_state_costs_the_certificate_its_place_and_nothing_else(start):
    server = start(*PLAIN, "--state", "/dev/full/state")

    assert post(server.url, IMAGE).headers["foldserve-certificate"] != "none"
    assert "could not be kept" in server.said()
    assert server.said().count("probing mnist: all at once") == 1, "the second worker took it over from the first"


# A machine whose memory limit leaves nothing for requests; no test can set a real one.
SCANT = """
import sys
from service.cgroup import ControlGroup, Memory
ControlGroup.memory = lambda self: Memory(limit=300 * 2**20, used=90 * 2**20)
from foldserve.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_memory_limit_that_requests_could_break_is_told_once_ready_and_after_each_load(start, tmp_path, workers):
    key = add_key(tmp_path / "keys")
    flags = (*PLAIN[:2], "--grace-s", "0", "--workers", workers, "--api-keys-file", str(tmp_path / "keys"))
    server = start(*flags, "--public-predict", program=("-c", SCANT))

    def is_told(times: int) -> None:
        told = "the memory limit of 300 MiB is low"
        wait_for(lambda: server.said().count(told) == times, f"it is told {times} times")

    is_told(1)
    answer = httpx.post(f"{server.url}/v2/repository/models/mnist/load", headers={"x-api-key": key}, timeout=60)
    assert answer.status_code == 200
    is_told(2)


# Python's wall clock jumps by hours, back and forth, from call to call; the kernel's cannot be moved by a test.
JUMPY = """
import itertools, sys, time
real, jumps = time.time, itertools.cycle((0, 86400, -86400, 3e8))
time.time = lambda: real() + next(jumps)
from foldserve.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_clock_that_jumps_changes_no_deadline_and_no_duration(start):
    server = start("--models", str(DEMO), "--grace-s", "0", program=("-c", JUMPY))
    for _ in range(20):
        assert post(server.url, IMAGE).status_code == 200
    seconds = counted(server.url, "foldserve_stage_duration_seconds_sum", stage="queue")

    assert 0 <= seconds < 60
    assert server.terminate() == 0
