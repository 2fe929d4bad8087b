"""Clients: `wrk` over kept connections, and what it and the kernel say of one run."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.processes import cpu_s
from benchmarks.serving.servers import Server

SCRIPT = """
local file = assert(io.open("{body}", "rb"))
wrk.method, wrk.path, wrk.body = "POST", "{path}", file:read("*a")
wrk.headers["Content-Type"] = "{content_type}"
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format('{{"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "bad": %d, "broken": %d}}',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of wrk; CPU time is that of the server's whole process tree."""

    server: str
    connections: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    failed: int


def is_installed() -> bool:
    """True where there is a wrk to drive servers with."""
    return shutil.which("wrk") is not None


@contextmanager
def script_of(server: Server) -> Iterator[Path]:
    """Write what clients of a server send, as wrk reads it."""
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder) / "body", Path(folder) / "request.lua"
        body.write_bytes(server.request.body)
        request = server.request
        script.write_text(SCRIPT.format(body=body, path=request.path, content_type=request.content_type))
        yield script


def drive(server: Server, connections: int, seconds: int) -> Run:
    """Send the server's request over so many connections, each as soon as the last is answered."""
    with script_of(server) as script:
        url = f"http://127.0.0.1:{server.port}"
        # One thread, as for one connection: it is never the limit, and takes the least from the server.
        options = ["-t", "1", "-c", str(connections), "-d", f"{seconds}s", "--timeout", "30s", "-s", str(script)]
        before, started = cpu_s(server.pid), time.monotonic()
        printed = subprocess.run(["wrk", *options, url], capture_output=True, text=True, check=True).stdout
        cpu, elapsed = cpu_s(server.pid) - before, time.monotonic() - started
    told = json.loads(printed.splitlines()[-1])
    count = max(1, told["requests"])
    failed = told["bad"] + told["broken"]
    return Run(
        server.name, connections, told["requests"] / elapsed, told["p50_ms"], told["p99_ms"], 1000 * cpu / count, failed
    )
