"""What tests of real processes share: one request, a load of many clients with their own tally, and the counters."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from service.golden import Golden

DEMO = Path(__file__).parents[1] / "models"
IMAGES = Golden.from_file(DEMO / "mnist" / "1" / "golden.npz").encoded
IMAGE = IMAGES[0]
PLAIN = ("--models", str(DEMO), "--workers", "2", "--no-share-identical", "--grace-s", "0")


def get(url: str, **options) -> httpx.Response:
    """Ask as `httpx.get` does, but wait as long for an answer as a busy machine may take."""
    return httpx.get(url, **{"timeout": 30, **options})


def post(url: str, content: bytes, **options) -> httpx.Response:
    return httpx.post(f"{url}/predict", content=content, **{"timeout": 30, **options})


def counted(url: str, metric: str = "foldserve_http_requests_total", **labels: str) -> float:
    """Return the sum of a counter's series that carry these labels."""
    total = 0.0
    for line in get(f"{url}/metrics").text.splitlines():
        found = re.fullmatch(rf"{metric}(?:{{(.*)}})? (\S+)", line)
        if found and all(f'{name}="{value}"' in (found[1] or "") for name, value in labels.items()):
            total += float(found[2])
    return total


class Load:
    """Clients that each keep a connection and ask without pause; `tally` counts their answers by status or error."""

    def __init__(self, url: str, content: bytes, clients: int) -> None:
        self.tally: Counter[object] = Counter()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(url, content)) for _ in range(clients)]

    def _ask(self, url: str, content: bytes) -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            while not self._stop.is_set():
                try:
                    outcome: object = client.post("/predict", content=content).status_code
                except httpx.TransportError as error:
                    outcome = type(error).__name__
                with self._lock:
                    self.tally[outcome] += 1

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def errors(self) -> int:
        """Requests without an answer."""
        return sum(count for outcome, count in self.tally.items() if isinstance(outcome, str))


@contextmanager
def load(url: str, content: bytes, clients: int) -> Iterator[Load]:
    """Keep a service busy while the block runs."""
    running = Load(url, content, clients)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def wait_for(condition: Callable[[], bool], what: str, within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


def workers_of(server) -> list[int]:
    """Return the process ids of a supervisor's workers, in the order in which they were started."""
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ready_workers(server) -> int:
    return get(f"{server.url}/info").json()["workers"]["ready"]


def wait_until_replaced(server, dead: int) -> None:
    """Wait until a pair that lost a worker is two again, which all of it know.

    Until its death is told, the other one says that two are ready; a successor is started only after that.
    """
    wait_for(lambda: dead not in (now := workers_of(server)) and len(now) == 2, "its successor starts", within_s=30)
    wait_for(lambda: ready_workers(server) == 2, "the worker is replaced", within_s=30)


def replace_a_worker(server) -> None:
    """Kill the older worker of a pair and wait until it is replaced."""
    killed = workers_of(server)[0]
    os.kill(killed, signal.SIGKILL)
    wait_until_replaced(server, killed)


def add_key(path: Path, role: str = "admin", name: str = "tests") -> str:
    """Add a key to a keys file as a person does; return it."""
    said = _keys("add", name, "--role", role, "--api-keys-file", str(path))
    return next(word for word in said.split() if word.startswith("fsk_"))


def remove_key(path: Path, name: str) -> None:
    _keys("remove", name, "--api-keys-file", str(path))


def _keys(*arguments: str) -> str:
    command = [sys.executable, "-m", "foldserve", "keys", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
