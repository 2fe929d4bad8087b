"""What a request costs: foldserve beside its peers, with the same float models, on this machine.

`python -m benchmarks.serve --scratch DIR` builds two models with seeded weights in DIR, starts each server that is
installed on a loopback port, and drives them in turn with `wrk`; medians are printed as Markdown tables, then one line
of JSON. `--peers` names Pythons with mosec, litserve, bentoml or mlserver in them; who is absent is named and left out.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.serving import load, scenarios
from benchmarks.serving.limit import images_per_s
from benchmarks.serving.load import Run
from benchmarks.serving.networks import NETWORKS, Network, build_models
from benchmarks.serving.processes import proportional_mb
from benchmarks.serving.servers import OTHERS, OURS, Server, find_python, serving

PARTS = ("speed", "memory", "bad", "crowd", "bomb", "spread", "limit")
WARM_S = 1
SPREAD_RUNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, help="folder for models, kept between runs [a temporary one]")
    parser.add_argument("--network", choices=list(NETWORKS), default="small", help="what is served [small]")
    parser.add_argument("--servers", nargs="+", default=[*OURS, *OTHERS], help="[all]")
    parser.add_argument("--peers", nargs="*", default=[sys.executable], help="Pythons that have peers [this one]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["speed"], help="what is measured [speed]")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64], help="[1 16 64]")
    parser.add_argument("--seconds", type=int, default=4, help="length of a run [4]")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn; medians are printed [3]")
    arguments = parser.parse_args()
    if not load.is_installed():
        sys.exit("wrk is not installed: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        models = build_models((arguments.scratch or Path(folder)).absolute())
        print(f"\n{_machine()}\n")
        rows = {part: _measure(part, models, arguments) for part in arguments.parts}
    print(json.dumps({"benchmark": "serve", "network": arguments.network, "machine": _machine(), **rows}))


def _measure(part: str, models: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    network = NETWORKS[arguments.network]
    if part == "limit":
        rows = [{"form": form, "images/s": images_per_s(models, network, form, arguments.seconds)} for form in FORMS]
    elif part == "speed":
        rows = list(_speed(models, network, arguments))
    else:
        rows = list(_one_by_one(part, models, network, arguments))
    _print(part, rows)
    return rows


FORMS = ("float", "exact")


def _start(name: str, models: Path, network: Network, peers: Sequence[str], until: ExitStack) -> Server | None:
    """Return a server that is up until then, or None, and say why, where it is not installed or does not start."""
    python = find_python(name, peers)
    if python is None:
        print(f"{name} is not installed, and left out", file=sys.stderr)
        return None
    try:
        return until.enter_context(serving(name, python, models, network))
    except RuntimeError as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        return None


def _speed(models: Path, network: Network, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the medians of runs in turn, all servers being up: idle ones cost nothing that could be measured."""
    with ExitStack() as stack:
        started = [_start(name, models, network, arguments.peers, stack) for name in arguments.servers]
        up = [server for server in started if server is not None]
        for server in up:
            load.drive(server, max(arguments.connections), WARM_S)
        runs = [
            load.drive(server, connections, arguments.seconds)
            for _ in range(arguments.repeats)
            for connections in arguments.connections
            for server in up
        ]
    for connections in arguments.connections:
        for server in up:
            yield _median([run for run in runs if (run.server, run.connections) == (server.name, connections)])


def _median(runs: Sequence[Run]) -> dict[str, Any]:
    middle = {
        name: statistics.median(getattr(run, name) for run in runs)
        for name in ("requests_per_s", "p50_ms", "p99_ms", "cpu_ms")
    }
    slowest, fastest = min(run.requests_per_s for run in runs), max(run.requests_per_s for run in runs)
    named = {"connections": runs[0].connections, "server": runs[0].server}
    return {**named, **middle, "lowest": slowest, "highest": fastest, "failed": sum(run.failed for run in runs)}


def _one_by_one(part: str, models: Path, network: Network, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what each server makes of a scenario, each being up alone, so that it shares no page of memory."""
    for name in arguments.servers:
        if part == "spread" and "workers" not in name:
            continue
        with ExitStack() as stack:
            server = _start(name, models, network, arguments.peers, stack)
            if server is not None:
                load.drive(server, CONNECTIONS_WARM, WARM_S)
                yield {"server": name, **_scenario(part, server, arguments.seconds)}


CONNECTIONS_WARM = 16


def _scenario(part: str, server: Server, seconds: int) -> dict[str, Any]:
    if part == "memory":
        return {"PSS MB": proportional_mb(server.pid)}
    if part == "bad":
        good, failed = scenarios.spoiled(server)
        return {"good requests": good, "failed": failed}
    if part == "crowd":
        return asdict(scenarios.crowd(server))
    if part == "bomb":
        status, took, grown = scenarios.bomb(server)
        return {"status": status, "seconds": took, "MB more": grown}
    shares = []
    for _ in range(SPREAD_RUNS):
        before = scenarios.cpu_of_children(server)
        load.drive(server, CONNECTIONS_WARM, seconds)
        shares.append(scenarios.shares_of_workers(server, before))
    return {"least / most CPU of a worker, worst run": min(least / most for least, most in map(_ends, shares))}


def _ends(shares: list[float]) -> tuple[float, float]:
    return shares[0], shares[-1]


def _print(part: str, rows: list[dict[str, Any]]) -> None:
    print(f"{part}\n")
    if not rows:
        print("nothing to measure\n")
        return
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(_cell(value) for value in row.values()) + " |")
    print(flush=True)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _machine() -> str:
    cores = len(os.sched_getaffinity(0))
    runtime = onnxruntime.__version__
    return f"{cores} cores, {platform.machine()}, Python {platform.python_version()}, ONNX Runtime {runtime}"


if __name__ == "__main__":
    main()
