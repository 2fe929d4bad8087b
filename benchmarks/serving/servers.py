"""Who is measured: how each server is started for a network, what its clients send, and how it is ended."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serving.networks import Network, model_file, repository
from benchmarks.serving.processes import kill_tree

PEERS = Path(__file__).parent / "peers"
START_TIMEOUT_S = 400  # a first certificate of a large network, on a busy machine
END_TIMEOUT_S = 20
BOUNDARY = "benchmark-boundary"


@dataclass(frozen=True, slots=True)
class Site:
    """What a server is started with: a network of the folder `models`, a port, a folder for its own files."""

    models: Path
    network: Network
    port: int
    scratch: Path


@dataclass(frozen=True, slots=True)
class Request:
    """What every client sends: a POST of one image."""

    path: str
    body: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class Launch:
    """A command, the folder that it runs in, and what clients send to it."""

    command: Sequence[str]
    request: Request
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is up: its first process, its port, and what clients send to it."""

    name: str
    pid: int
    port: int
    request: Request


Launcher = Callable[[Site, str], Launch]  # a site, and the Python that has the server


def foldserve(form: str, *flags: str) -> Launcher:
    """Return how foldserve is started: one form, nothing shared, for every client sends the same image."""

    def launch(site: Site, python: str) -> Launch:
        models = str(repository(site.models, site.network).absolute())
        command = [python, "-m", "foldserve", "serve", "--models", models, "--port", str(site.port), "--form", form]
        quiet = ["--log-level", "warning", "--grace-s", "0", "--no-share-identical"]
        return Launch([*command, *quiet, *flags], Request("/predict", site.network.image(), "image/*"))

    return launch


def _mosec(site: Site, python: str) -> Launch:
    command = [python, "serve_mosec.py", "--address", "127.0.0.1", "--port", str(site.port), "--timeout", "30000"]
    return _peer(site, [*command, "--log-level", "error"], Request("/inference", site.network.image(), "image/*"))


def _bare(site: Site, python: str) -> Launch:
    return _peer(site, [python, "serve_bare.py"], Request("/", site.network.image(), "image/*"))


def _litserve(site: Site, python: str) -> Launch:
    body = json.dumps({"image": b64encode(site.network.image()).decode()}).encode()
    return _peer(site, [python, "serve_litserve.py"], Request("/predict", body, "application/json"))


def _bentoml(site: Site, python: str) -> Launch:
    command = [python, "-m", "bentoml", "serve", "serve_bentoml:Classify", "--host", "127.0.0.1"]
    head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="images"; filename="image"\r\n\r\n'
    body = head.encode() + site.network.image() + f"\r\n--{BOUNDARY}--\r\n".encode()
    request = Request("/predict", body, f"multipart/form-data; boundary={BOUNDARY}")
    return _peer(site, [*command, "--port", str(site.port)], request)


def _mlserver(site: Site, python: str) -> Launch:
    ports = {"http_port": site.port, "grpc_port": free_port(), "metrics_port": free_port()}
    settings = {"host": "127.0.0.1", "debug": False, "parallel_workers": 2, "use_structured_logging": False, **ports}
    batching = {"max_batch_size": 8, "max_batch_time": 0.002}
    model = {"name": "classify", "implementation": "serve_mlserver.Classify", **batching}
    (site.scratch / "settings.json").write_text(json.dumps(settings))
    (site.scratch / "model-settings.json").write_text(json.dumps(model))
    image = b64encode(site.network.image()).decode()
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [image]}
    body = json.dumps({"inputs": [tensor]}).encode()
    launcher = "import sys; from mlserver.cli import main; sys.argv[0] = 'mlserver'; main()"
    command = [python, "-c", launcher, "start", str(site.scratch)]
    return _peer(site, command, Request("/v2/models/classify/infer", body, "application/json"))


def _peer(site: Site, command: Sequence[str], request: Request) -> Launch:
    known = {
        "BENCHMARK_MODEL": str(model_file(site.models, site.network).absolute()),
        "BENCHMARK_SIDE": str(site.network.size),
        "BENCHMARK_PORT": str(site.port),
        "PYTHONPATH": str(PEERS.absolute()),
        "BENTOML_DO_NOT_TRACK": "true",
        "BENTOML_HOME": str(site.scratch),
        "OMP_NUM_THREADS": "1",
    }
    return Launch(command, request, known, PEERS)


OURS: dict[str, Launcher] = {
    "foldserve, float": foldserve("float"),
    "foldserve, exact": foldserve("exact"),
    "foldserve, float, 2 workers": foldserve("float", "--workers", "2"),
    "foldserve, exact, 2 workers": foldserve("exact", "--workers", "2"),
}
FLOOR = "bare"  # no server, but what one in Python cannot go below
OTHERS: dict[str, Launcher] = {
    FLOOR: _bare,
    "mosec": _mosec,
    "litserve": _litserve,
    "bentoml": _bentoml,
    "mlserver": _mlserver,
}


def find_python(name: str, pythons: Sequence[str]) -> str | None:
    """Return the first of `pythons` in which a server is installed; our own, and the floor, run in this one."""
    if name in {*OURS, FLOOR}:
        return sys.executable
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return next((one for one in pythons if subprocess.run([one, "-c", probe], check=False).returncode == 0), None)


@contextlib.contextmanager
def serving(
    name: str, python: str, models: Path, network: Network, launcher: Launcher | None = None
) -> Iterator[Server]:
    """Start a server on a free loopback port, wait until it answers an image, and end it with the block.

    Raises RuntimeError where it does not answer within START_TIMEOUT_S.
    """
    with tempfile.TemporaryDirectory() as folder:
        site = Site(models, network, free_port(), Path(folder))
        launch = (launcher or {**OURS, **OTHERS}[name])(site, python)
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                launch.command,
                cwd=launch.folder,
                env={**os.environ, **launch.environment},  # noqa: TID251 - a child gets what this process has, and more
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _await_answer(process, site.port, launch.request, log)
            yield Server(name, process.pid, site.port, launch.request)
        finally:
            _end(process)


def post(port: int, request: Request, timeout_s: float = 30, body: bytes | None = None) -> int:
    """Return the status of one request over a connection of its own, 0 where it failed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        headers = {"content-type": request.content_type}
        connection.request("POST", request.path, request.body if body is None else body, headers)
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()
    return answer.status


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_answer(process: "subprocess.Popen[bytes]", port: int, request: Request, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while post(port, request) != 200:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no answer from {' '.join(process.args)}: {log.read_text()[-2000:]}")  # type: ignore[arg-type]  # a list of strings here
        time.sleep(0.1)  # a peer tells nobody that it is ready


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_TIMEOUT_S)
    kill_tree(process.pid)
    process.wait()
