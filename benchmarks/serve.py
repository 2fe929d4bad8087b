"""What a request costs: throughput, latency, and CPU time of the server for one image a request over keep-alive.

A real server process on a loopback port, asked by plain sockets from this process, which shares the cores with it.
Prints a table, then one line of JSON. `python benchmarks/serve.py --help` for the options.
"""

import argparse
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime

from service.golden import Golden

START_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Row:
    """One run; CPU time, user and system, and proportional memory are those of the server's whole process tree."""

    workers: int
    connections: int
    requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms_per_request: float
    memory_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="model repository [models]")
    parser.add_argument("--model", default="mnist", help="model to ask [mnist]")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 4, 16, 64], help="[1 4 16 64]")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a run [4]")
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="workers to compare, in turn [1]")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn; medians are printed [3]")
    arguments = parser.parse_args()
    image = _golden_image(arguments.models / arguments.model)
    runs: list[Row] = []
    for _ in range(arguments.repeats):
        for workers in arguments.workers:  # servers in turn, so that a busy machine is busy for all
            runs += _runs(arguments, workers, image)
    groups = [(workers, count) for workers in arguments.workers for count in arguments.connections]
    rows = [_median([run for run in runs if (run.workers, run.connections) == group]) for group in groups]
    _print(rows, arguments.repeats)


def _runs(arguments: argparse.Namespace, workers: int, image: bytes) -> list[Row]:
    port, process = _start(arguments.models, workers)
    try:
        return [
            _measure(port, process.pid, image, arguments.model, workers, connections, arguments.seconds)
            for connections in arguments.connections
        ]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _golden_image(folder: Path) -> bytes:
    newest = max(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())
    return Golden.from_file(folder / str(newest) / "golden.npz").encoded[0]


def _start(models: Path, workers: int) -> tuple[int, subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "foldserve", "serve", "--models", str(models), "--port", str(port)]
    # Every client sends the same image: shared, it would run once for all of them.
    process = subprocess.Popen(
        [*command, "--log-level", "warning", "--grace-s", "0", "--workers", str(workers), "--no-share-identical"]
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while b" 200 " not in _ask(port, b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"):
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit("the server did not become ready")
        time.sleep(0.05)
    return port, process


def _ask(port: int, request: bytes) -> bytes:
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(request)
            return connection.recv(65536)
    except OSError:
        return b""


def _measure(port: int, pid: int, image: bytes, model: str, workers: int, connections: int, seconds: float) -> Row:
    head = f"POST /predict?model={model} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(image)}\r\n\r\n"
    request = head.encode() + image
    stop = time.monotonic() + seconds
    cpu_before, started = _cpu_s(pid), time.monotonic()
    with ThreadPoolExecutor(connections) as clients:
        latencies = list(clients.map(lambda _: _client(port, request, stop), range(connections)))
    elapsed, cpu = time.monotonic() - started, _cpu_s(pid) - cpu_before
    every = sorted(latency for each in latencies for latency in each)
    return Row(
        workers,
        connections,
        len(every),
        len(every) / elapsed,
        1000 * every[len(every) // 2],
        1000 * every[int(len(every) * 0.99)],
        1000 * cpu / len(every),
        _proportional_mb(pid),
    )


def _client(port: int, request: bytes, stop: float) -> list[float]:
    latencies = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while (started := time.monotonic()) < stop:
            connection.sendall(request)
            answer = _read_answer(connection)
            latencies.append(time.monotonic() - started)
            if not answer.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(answer.decode())
    return latencies


def _read_answer(connection: socket.socket) -> bytes:
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += _receive(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += _receive(connection)
    return head + b"\r\n\r\n" + body


def _receive(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise ConnectionError("the server closed the connection")
    return data


def _tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in _tree(int(child)))]


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process and its children, seconds (proc(5): utime, stime)."""
    stats = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in _tree(pid)]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def _proportional_mb(pid: int) -> float:
    rollups = [Path(f"/proc/{one}/smaps_rollup").read_text() for one in _tree(pid)]
    return sum(int(text.partition("\nPss:")[2].split()[0]) for text in rollups) / 1000


def _median(runs: list[Row]) -> Row:
    values = {name: statistics.median(getattr(run, name) for run in runs) for name in Row.__slots__}
    return Row(
        **{
            **values,
            "workers": runs[0].workers,
            "connections": runs[0].connections,
            "requests": int(values["requests"]),
        }
    )


def _print(rows: list[Row], repeats: int) -> None:
    columns = ["workers", "connections", "requests/s", "p50 ms", "p99 ms", "CPU ms/req", "MB"]
    print("  ".join(f"{column:>11}" for column in columns))
    for row in rows:
        speed = f"{row.requests_per_s:11,.0f}  {row.p50_ms:11.2f}  {row.p99_ms:11.2f}"
        print(f"{row.workers:11}  {row.connections:11}  {speed}  {row.cpu_ms_per_request:11.2f}  {row.memory_mb:11.0f}")
    facts = {
        "benchmark": "serve",
        "repeats": repeats,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
