"""What batch independence costs: throughput certified against uncertified, time to certify, memory of a session.

Measures the committed model and ResNet-18 and -50 for images of 224 × 224, whose seeded weights are worthless but
whose arithmetic is the real one. Prints tables, then one line of JSON. Needs the training half, which makes the files.
`--cuda-classes` instead shows which batch sizes agree bit for bit on CUDA, for each way cuDNN may be set.
"""

import argparse
import asyncio
import ctypes
import gc
import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from benchmarks.independence_cuda import cuda_classes
from benchmarks.random_resnets import write_resnet
from service.artifact import Artifact
from service.batching import Batcher
from service.config import cpu_count
from service.engine import Device, choose_device, open_engine
from service.independence.certificate import CertificateStore
from service.independence.certify import candidates, certify, subject_of
from service.independence.effort import QUICK
from service.independence.spotcheck import SpotCheck
from service.repository import Model, Repository
from service.running import Job, Logits, Runner

DEMO = "mnist"
MAX_BATCH_SIZE = 8
SPOT_CHECK_SHARE = 0.001  # the service's default


@dataclass(frozen=True, slots=True)
class Throughput:
    """Images per second at so many callers, certified and not: medians, and those of the ratios of neighbouring runs.

    `cpu_ratio` compares images per second of CPU time, which other tenants of a shared machine disturb less.
    """

    model: str
    callers: int
    certified: float
    uncertified: float
    ratio: float
    cpu_ratio: float
    cpu_lowest: float
    cpu_highest: float


@dataclass(frozen=True, slots=True)
class Certifying:
    """`foldserve certify`, the whole process, median seconds: without a certificate, and under a kept one."""

    model: str
    full_s: float
    full_runs: int
    quick_s: float
    quick_runs: int
    images: int
    answers: int
    cut: list[str]
    shapes: list[list[int]]


@dataclass(frozen=True, slots=True)
class Memory:
    """PSS over that of the process with the file read, median MiB: as sessions open, and after their largest run."""

    model: str
    file: float
    one_session: float
    one_session_used: float
    two_sessions: float
    two_sessions_used: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="repository with the demo model [models]")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turn; medians are printed [5]")
    parser.add_argument("--pairs", type=int, default=15, help="the same for throughput, whose noise is larger [15]")
    parser.add_argument("--full-repeats", type=int, default=5, help="the same for full probes of ResNet-50 [5]")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 4, 16], help="images asked at once [1 4 16]")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a throughput run [1]")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="cpu", help="[cpu]")
    parser.add_argument("--quick", action="store_true", help="leave out ResNet-50")
    parser.add_argument("--cuda-classes", action="store_true", help="only the bit-classes of batch sizes on CUDA")
    parser.add_argument("--dry-run", action="store_true", help="try --cuda-classes without a GPU: ResNet-18, few sizes")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)  # one measurement, in a process of its own
    arguments = parser.parse_args()
    logging.getLogger("service").setLevel(logging.WARNING)
    if arguments.memory_of:
        print(json.dumps(_memory_here(arguments.memory_of)))
        return
    with tempfile.TemporaryDirectory() as folder:
        names = ["resnet18"] if arguments.quick or arguments.dry_run else ["resnet18", "resnet50"]
        paths = {DEMO: arguments.models} | {name: write_resnet(Path(folder), name) for name in names}
        found = (
            cuda_classes(paths, names, dry_run=arguments.dry_run)
            if arguments.cuda_classes
            else _measure(paths, Path(folder), arguments)
        )
    print(
        json.dumps(
            {"benchmark": "independence", **_machine(), "repeats": arguments.repeats, "pairs": arguments.pairs, **found}
        )
    )


def _measure(paths: dict[str, Path], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    device = choose_device(arguments.device)
    quick = [DEMO, "resnet18"]
    throughputs = [row for name in quick for row in _throughputs(paths[name], name, device, arguments)]
    _print("throughput, images/s", throughputs)
    judged = [name for name in paths if name != "resnet18" or arguments.quick]
    times = [_certifying(paths[name], name, folder / f"state-{name}", arguments) for name in judged]
    _print("foldserve certify, seconds of the whole process", times)
    for row in times:
        for cut in row.cut:
            print(f"{row.model}, cut from the full probe: {cut}")
    memory = [_memory(paths[name], name, arguments.repeats) for name in judged if device.used == "cpu"]
    _print("memory, MiB (PSS)", memory)
    rows = {"throughput": throughputs, "certifying": times, "memory": memory}
    return {key: [asdict(row) for row in found] for key, found in rows.items()}


def _throughputs(models: Path, name: str, device: Device, arguments: argparse.Namespace) -> Iterator[Throughput]:
    """Yield the rows of one model: queue, planner, runs and spot checks, without HTTP and decoding to hide behind."""
    model = Repository(models, open_engine).load(name, device)
    shapes = candidates(cpu_count(), device.used, MAX_BATCH_SIZE)
    lanes = cpu_count() if device.used == "cpu" else 1
    subject = subject_of(name, model.version, model.artifact, model.engine, shapes, lanes)
    certificate = certify(subject, CertificateStore(None), effort=QUICK)
    if certificate.verdict != "certified":
        sys.exit(f"{name} is refused here: {certificate.reason}")
    runners = {"certified": Runner(model, certificate), "uncertified": Runner(model, None)}
    for callers in arguments.callers:
        runs: dict[str, list[NDArray[np.float64]]] = {mode: [] for mode in runners}
        for repeat in range(arguments.pairs + 1):
            for mode in sorted(runners, reverse=bool(repeat % 2)):  # who goes first alternates
                rates = asyncio.run(_offer(runners[mode], model, callers, arguments.seconds))
                if repeat:  # the first pair warms up
                    runs[mode].append(rates)
        rate, cpu_rate = np.transpose([runs["certified"], runs["uncertified"]])  # (2, repeats, 2) → 2 × (repeats, 2)
        ratios, cpu_ratios = rate[:, 0] / rate[:, 1], cpu_rate[:, 0] / cpu_rate[:, 1]
        seen = (*np.median(rate, axis=0), np.median(ratios), np.median(cpu_ratios), cpu_ratios.min(), cpu_ratios.max())
        yield Throughput(name, callers, *(float(value) for value in seen))


async def _offer(runner: Runner, model: Model, callers: int, seconds: float) -> NDArray[np.float64]:
    """Return the images per second, and per CPU second, when each caller asks again as soon as it is answered."""
    lanes = cpu_count() if model.engine.describe()["device"] == "cpu" else 1
    spot_check = SpotCheck(runner.replay, SPOT_CHECK_SHARE if runner.reference else 0.0, lambda _: None)
    batcher: Batcher[Job, Logits] = Batcher(
        runner.run, observer=_Deaf(), take=runner.take, max_batch_size=MAX_BATCH_SIZE, max_queue_size=512, lanes=lanes
    )
    images = itertools.cycle(model.artifact.golden.pixels)

    async def ask(stop: float) -> int:
        answered = 0
        while time.monotonic() < stop:
            pixels = next(images)
            spot_check.offer(pixels, await batcher.submit(Job(pixels), deadline=stop + 60))
            answered += 1
        return answered

    async with batcher:
        with spot_check:
            started, cpu_started = time.monotonic(), time.process_time()
            counts = await asyncio.gather(*(ask(started + seconds) for _ in range(callers)))
            return sum(counts) / np.array([time.monotonic() - started, time.process_time() - cpu_started])


class _Deaf:
    """An observer that counts nothing."""

    def ran(self, size: int, queue_s: object, run_s: float) -> None: ...

    def dropped(self, reason: str) -> None: ...


def _certifying(models: Path, name: str, state: Path, arguments: argparse.Namespace) -> Certifying:
    repeats = arguments.full_repeats if name == "resnet50" else arguments.repeats
    command = [sys.executable, "-m", "foldserve", "certify", name, "--json", "--models", str(models)]
    command += ["--state", str(state), "--device", arguments.device, "--max-batch-size", str(MAX_BATCH_SIZE)]
    full = [_timed([*command, "--fresh"]) for _ in range(repeats)]
    quick = [_timed(command) for _ in range(arguments.repeats)]
    certificate = full[-1][1]
    return Certifying(
        name,
        *(round(statistics.median(seconds for seconds, _ in full), 2), len(full)),
        *(round(statistics.median(seconds for seconds, _ in quick), 2), len(quick)),
        certificate["probe"]["images"],
        certificate["measured"]["comparisons"],
        certificate["probe"]["cut"],
        [[shape["batch_size"], shape["threads"]] for shape in certificate["shapes"]],
    )


def _timed(command: list[str]) -> tuple[float, dict[str, Any]]:
    started = time.monotonic()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return time.monotonic() - started, json.loads(output)


def _memory(models: Path, name: str, repeats: int) -> Memory:
    command = [sys.executable, "-m", "benchmarks.independence", "--memory-of", str(models / name / "1")]
    runs = [_timed(command)[1] for _ in range(repeats)]
    return Memory(name, **{key: round(statistics.median(run[key] for run in runs), 1) for key in runs[0]})


def _memory_here(folder: Path) -> dict[str, float]:
    artifact = Artifact.load(folder)
    batch = np.resize(artifact.golden.pixels, (MAX_BATCH_SIZE, *artifact.golden.pixels.shape[1:]))
    before = _pss_mib()
    engine = open_engine(artifact.model_bytes, choose_device("cpu"))  # it opens the session of one thread
    seen = {"one_session": _pss_mib()}
    engine.run(batch)
    seen["one_session_used"] = _pss_mib()
    engine.run(batch[:1], 2)
    seen["two_sessions"] = _pss_mib()
    engine.run(batch, 2)
    seen["two_sessions_used"] = _pss_mib()
    return {"file": len(artifact.model_bytes) / 2**20} | {key: value - before for key, value in seen.items()}


def _pss_mib() -> float:
    """Return the proportional set size, proc(5), after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


def _print(title: str, rows: list[Any]) -> None:
    print(f"\n{title}")
    if rows:
        names = [name for name in asdict(rows[0]) if name != "cut"]
        cells = [names, *([_cell(asdict(row)[name]) for name in names] for row in rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
        for line in cells:
            print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:,.1f}"
    return " ".join(f"{size}×{threads}" for size, threads in value) if isinstance(value, list) else str(value)


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    versions = {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    return {"processor": processor, "cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), **versions}


if __name__ == "__main__":
    main()
