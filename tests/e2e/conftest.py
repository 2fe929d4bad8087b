"""Real server processes on loopback ports."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from containers import Compose, Docker, engine
from e2e_support import get

STARTS_WITHIN_S = 30.0
ENDS_WITHIN_S = 30.0


@dataclass
class Server:
    """A running `foldserve serve`; what it says is in `log`."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    def wait_for_url(self) -> None:
        pattern = re.compile(r"listening on (http://\S+)")
        self.poll(lambda: pattern.search(self.said()) is not None, "it listens")
        found = pattern.search(self.said())
        assert found
        self.url = found[1]

    def wait_until_ready(self) -> None:
        self.poll(lambda: get(f"{self.url}/readyz").status_code == 200, "it is ready")

    def poll(self, condition: Callable[[], bool], what: str, within_s: float = STARTS_WITHIN_S) -> None:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"it ended: {self.said()}"
            if condition():
                return
            time.sleep(0.02)
        raise AssertionError(f"never happened: {what}; it said: {self.said()}")

    def said(self) -> str:
        return self.log.read_text()

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * 4096

    def peak_bytes(self) -> int:
        """Return the most memory that the process ever held (proc(5), VmHWM)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+)", status)
        assert found
        return int(found[1]) * 1024

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(ENDS_WITHIN_S)


Start = Callable[..., Server]


def start_server(log: Path, *flags: str, program: tuple[str, ...] = ("-m", "foldserve")) -> Server:
    command = [sys.executable, *program, "serve", "--port", "0", "--device", "cpu", *flags]
    with log.open("wb") as sink:
        return Server(subprocess.Popen(command, stdout=sink, stderr=sink, cwd=log.parent), log)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start servers with flags of one's own; all are gone when the test is."""
    servers: list[Server] = []

    def starting(*flags: str, **options: tuple[str, ...]) -> Server:
        servers.append(start_server(tmp_path / f"server{len(servers)}.log", *flags, **options))
        servers[-1].wait_for_url()
        servers[-1].wait_until_ready()
        return servers[-1]

    yield starting
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Start]:
    """Start servers that may never be ready; all are gone when the test is."""
    servers: list[Server] = []

    def launching(*flags: str) -> Server:
        servers.append(start_server(tmp_path / f"launched{len(servers)}.log", *flags))
        return servers[-1]

    yield launching
    for server in servers:
        server.process.kill()
        server.process.wait()


@contextmanager
def running_server(log: Path, *flags: str) -> Iterator[Server]:
    running = start_server(log, *flags)
    try:
        running.wait_for_url()
        running.wait_until_ready()
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as they found it."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with running_server(log, "--models", str(models), "--body-timeout-s", "1") as running:
        yield running


@pytest.fixture(scope="session")
def strict(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server that takes heads of 4,096 bytes and waits a second for them."""
    log = tmp_path_factory.mktemp("strict") / "server.log"
    with running_server(log, "--models", str(models), "--max-head-bytes", "4096", "--head-timeout-s", "1") as running:
        yield running


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """The container engine, for all tests that need one."""
    with engine() as environment:
        yield Docker(environment)


@pytest.fixture(scope="session")
def cpu_image(docker: Docker) -> str:
    """The image that serves on the CPU, as it is built from this tree."""
    docker.build("cpu")
    return "foldserve:cpu"


Project = Callable[..., Compose]


@pytest.fixture
def project(docker: Docker) -> Iterator[Project]:
    """Make projects of `docker compose`; their containers, networks and volumes are gone when the test is."""
    made: list[Compose] = []

    def making(name: str, *files: str | Path, **variables: str) -> Compose:
        named = ("docker-compose.yml", *map(str, files))
        made.append(Compose(f"foldserve-{name}", named, docker.environment | variables))
        return made[-1]

    yield making
    for one in made:
        one.tried("--profile", "*", "down", "--volumes", "--timeout", "5")
