"""Several workers are one service: one readiness, one count, one certificate; a death costs only its own callers."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from e2e_support import counted, get, load, post, replace_a_worker, wait_for, wait_until_replaced, workers_of
from PIL import Image
from support import encode, random_pixels

pytestmark = pytest.mark.e2e

IMAGE = encode(Image.fromarray(random_pixels(1, seed=5)[0]), "PNG")
ESTABLISHED, CLOSE_WAIT = "01", "08"  # in /proc/net/tcp (Linux, include/net/tcp_states.h)


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # proc(5): utime, stime


@pytest.fixture
def pair(start, models):
    return start("--models", str(models), "--workers", "2", "--grace-s", "0")


def test_every_run_of_sixteen_kept_connections_gives_each_worker_eight(pair):
    def wait_until_alone() -> None:
        held = (ESTABLISHED, CLOSE_WAIT)  # what its caller has closed counts until its worker closes it too
        wait_for(lambda: [sockets_of(pid, held) for pid in workers_of(pair)] == [0, 0], "the connections are gone")

    wait_until_alone()  # the start was asked about over connections, too
    for _ in range(5):
        with ExitStack() as stack:
            clients = [stack.enter_context(httpx.Client(base_url=pair.url, timeout=30)) for _ in range(16)]
            before = [cpu_ticks(pid) for pid in workers_of(pair)]
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(lambda client: [client.post("/predict", content=IMAGE) for _ in range(20)], clients))
            held = [sockets_of(pid) for pid in workers_of(pair)]
            assert all(after > earlier for earlier, after in zip(before, map(cpu_ticks, workers_of(pair)), strict=True))
        assert held == [8, 8]
        wait_until_alone()


def sockets_of(pid: int, states: tuple[str, ...] = (ESTABLISHED,)) -> int:
    """Return how many TCP connections in these states a process holds; one that has ended holds none."""
    inodes = set()
    with suppress(OSError):  # the process ends meanwhile
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inodes.add(str(entry.readlink()))
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return len(inodes & {f"socket:[{fields[9]}]" for fields in map(str.split, lines) if fields[3] in states})


def test_the_counters_of_all_workers_are_one_also_after_one_was_killed(pair):
    for _ in range(10):
        assert post(pair.url, IMAGE).status_code == 200
    answered = [counted(pair.url, route="/predict", code="200") for _ in range(4)]
    replace_a_worker(pair)
    for _ in range(10):
        assert post(pair.url, IMAGE).status_code == 200

    assert answered == [10] * 4, "whichever worker is asked"
    assert counted(pair.url, route="/predict", code="200") == 20


def test_one_certifies_and_the_others_take_its_certificate_over_without_a_probe(pair):
    said = pair.said()
    certificates = {get(f"{pair.url}/models/tiny").json()["certificate"]["fingerprint"]["model"] for _ in range(4)}

    assert len(certificates) == 1
    assert said.count("probing tiny: all at once") == 1
    assert said.count("give equal bits") == 2


def test_a_killed_worker_costs_its_neighbours_callers_nothing_and_is_replaced(pair):
    with load(pair.url, IMAGE, clients=8) as running:
        wait_for(lambda: sum(running.tally.values()) > 50, "the load runs")
        doomed = workers_of(pair)[0]
        hers = sockets_of(doomed)
        os.kill(doomed, signal.SIGKILL)
        assert get(f"{pair.url}/readyz").status_code == 200, "the other one serves"
        wait_until_replaced(pair, doomed)
        wait_for(lambda: min(sockets_of(pid) for pid in workers_of(pair)) >= 3, "the new one gets its share")

    assert running.errors <= hers <= 8
    assert set(running.tally) - {200} <= {"ReadError", "RemoteProtocolError", "WriteError"}
    assert running.tally[200] > 50
    assert "was killed by SIGKILL" in pair.said()


def test_a_worker_that_stands_still_is_replaced(start, models):
    pair = start("--models", str(models), "--workers", "2", "--worker-timeout-s", "5", "--grace-s", "0")
    still = workers_of(pair)[0]
    os.kill(still, signal.SIGSTOP)
    pair.poll(lambda: "it had been silent for" in pair.said(), "the supervisor notices")
    wait_until_replaced(pair, still)

    assert post(pair.url, IMAGE).status_code == 200
    assert pair.terminate() == 0


def test_a_worker_told_to_go_answers_what_it_has_and_is_replaced(pair):
    with load(pair.url, IMAGE, clients=4) as running:
        wait_for(lambda: running.tally[200] > 20, "the load runs")
        leaver = workers_of(pair)[0]
        os.kill(leaver, signal.SIGTERM)
        wait_until_replaced(pair, leaver)

    assert running.errors == 0
    assert set(running.tally) == {200}


def test_workers_that_keep_dying_end_the_service_with_a_reason(pair):
    deadline = time.monotonic() + 60
    while pair.process.poll() is None and time.monotonic() < deadline:
        for pid in workers_of(pair):
            with suppress(ProcessLookupError):  # it is reaped meanwhile
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)

    assert pair.process.wait(1) == 1
    assert "5 workers died within 60 s" in pair.said()
    assert "Traceback" not in pair.said()


def test_a_model_that_is_refused_ends_the_service_with_the_reason_of_the_first_worker(launch, tmp_path):
    (tmp_path / "models").mkdir()
    server = launch("--models", str(tmp_path / "models"), "--workers", "2")

    assert server.process.wait(30) == 1
    assert "holds no model" in server.said()
    assert "Traceback" not in server.said()


def test_workers_end_when_their_supervisor_is_killed(pair):
    workers = workers_of(pair)
    pair.process.kill()
    pair.process.wait()

    wait_for(lambda: not any(map(is_alive, workers)), "the workers are gone")


def is_alive(pid: int) -> bool:
    """False for a zombie too: who inherits an orphan need not reap it."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # proc(5): state


def test_no_request_is_cut_off_when_the_service_ends_under_load(start, models):
    pair = start("--models", str(models), "--workers", "2", "--grace-s", "1")
    with load(pair.url, IMAGE, clients=8) as running:
        wait_for(lambda: running.tally[200] > 50, "the load runs")
        assert pair.terminate() == 0

    assert set(running.tally) <= {200, "ConnectError"}, "none that was accepted is cut off"
