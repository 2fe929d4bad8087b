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

from service.artifact import Golden

START_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Row:
    """One run; CPU time is the server's, user and system."""

    connections: int
    requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms_per_request: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="model repository [models]")
    parser.add_argument("--model", default="mnist", help="model to ask [mnist]")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 4, 16, 64], help="[1 4 16 64]")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a run [4]")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn; medians are printed [3]")
    arguments = parser.parse_args()
    image = _golden_image(arguments.models / arguments.model)
    port, process = _start(arguments.models)
    try:
        runs = [
            _measure(port, process.pid, image, arguments.model, connections, arguments.seconds)
            for _ in range(arguments.repeats)
            for connections in arguments.connections
        ]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    rows = [_median([run for run in runs if run.connections == count]) for count in arguments.connections]
    _print(rows, arguments.repeats)


def _golden_image(folder: Path) -> bytes:
    newest = max(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())
    return Golden.from_file(folder / str(newest) / "golden.npz").encoded[0]


def _start(models: Path) -> tuple[int, subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "foldserve", "serve", "--models", str(models), "--port", str(port)]
    # Every client sends the same image: shared, it would run once for all of them.
    process = subprocess.Popen([*command, "--log-level", "warning", "--no-share-identical"])
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


def _measure(port: int, pid: int, image: bytes, model: str, connections: int, seconds: float) -> Row:
    head = f"POST /predict?model={model} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(image)}\r\n\r\n"
    request = head.encode() + image
    stop = time.monotonic() + seconds
    cpu_before, started = _cpu_s(pid), time.monotonic()
    with ThreadPoolExecutor(connections) as clients:
        latencies = list(clients.map(lambda _: _client(port, request, stop), range(connections)))
    elapsed, cpu = time.monotonic() - started, _cpu_s(pid) - cpu_before
    every = sorted(latency for each in latencies for latency in each)
    return Row(
        connections,
        len(every),
        len(every) / elapsed,
        1000 * every[len(every) // 2],
        1000 * every[int(len(every) * 0.99)],
        1000 * cpu / len(every),
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


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # proc(5): utime, stime


def _median(runs: list[Row]) -> Row:
    values = {name: statistics.median(getattr(run, name) for run in runs) for name in Row.__slots__}
    return Row(**{**values, "connections": runs[0].connections, "requests": int(values["requests"])})


def _print(rows: list[Row], repeats: int) -> None:
    print(f"{'connections':>11}  {'requests/s':>10}  {'p50 ms':>7}  {'p99 ms':>7}  {'CPU ms/request':>14}")
    for row in rows:
        latency = f"{row.p50_ms:7.2f}  {row.p99_ms:7.2f}"
        print(f"{row.connections:11}  {row.requests_per_s:10,.0f}  {latency}  {row.cpu_ms_per_request:14.2f}")
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
