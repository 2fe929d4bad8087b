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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from service.artifact import GOLDEN_FILE, MANIFEST_KEY, MODEL_FILE, Artifact
from service.batching import Batcher
from service.config import arithmetic_environment, cpu_count
from service.engine import CUDA, Device, choose_device, cuda_problem, open_engine
from service.golden import Golden
from service.independence.certificate import CertificateStore
from service.independence.certify import candidates, certify, subject_of
from service.independence.effort import QUICK
from service.independence.probe import Pixels, digest_of, fill
from service.independence.spotcheck import SpotCheck
from service.manifest import Manifest
from service.preprocessing import Preprocessing, encode_png
from service.repository import Model, Repository
from service.running import Job, Logits, Runner
from training.export import Classifier, to_onnx
from training.folding.modules import fold
from training.loop import Normalize
from training.parity import reference

DEMO = "mnist"
SIDE = 224
CLASSES = 1000
GOLDEN_IMAGES = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
MAX_BATCH_SIZE = 8
SPOT_CHECK_SHARE = 0.001  # the service's default
CUDA_SIZES = range(1, 65)
CUDA_SEARCHES = ("HEURISTIC", "EXHAUSTIVE", "DEFAULT")


class Block(nn.Module):
    """He et al. 2015, figure 5: two 3 × 3 convolutions, or with `expansion` 4 the bottleneck of 1 × 1, 3 × 3, 1 × 1."""

    def __init__(self, inputs: int, width: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        outputs = width * expansion
        kernels = [(inputs, width, 3), (width, width, 3)] if expansion == 1 else None
        kernels = kernels or [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
        strided = next(index for index, kernel in enumerate(kernels) if kernel[2] == 3)
        layers = [conv_norm(*kernel, stride if index == strided else 1) for index, kernel in enumerate(kernels)]
        self.body = nn.Sequential(*itertools.chain.from_iterable((layer, nn.ReLU()) for layer in layers))[:-1]
        is_plain = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if is_plain else conv_norm(inputs, outputs, 1, stride)

    def forward(self, features: Tensor) -> Tensor:
        """Return features (N, width · expansion, H/stride, W/stride)."""
        return functional.relu(self.body(features) + self.shortcut(features))


class ResNet(nn.Module):
    """He et al. 2015, table 1: a 7 × 7 stem, four stages of blocks, global average pooling, a linear head."""

    def __init__(self, depths: tuple[int, ...], expansion: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks: list[nn.Module] = []
        inputs = 64
        for stage, depth in enumerate(depths):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Block(inputs, 64 * 2**stage, stride=stride, expansion=expansion))
                inputs = 64 * 2**stage * expansion
        self.stages = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        logits: Tensor = self.head(self.pool(self.stages(self.stem(images))).flatten(1))
        return logits


RESNETS: dict[str, Callable[[], ResNet]] = {
    "resnet18": lambda: ResNet((2, 2, 2, 2), expansion=1),
    "resnet50": lambda: ResNet((3, 4, 6, 3), expansion=4),
}


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
        paths = {DEMO: arguments.models} | {name: _write_resnet(Path(folder), name) for name in names}
        found = (
            _cuda_classes(paths, names, arguments)
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


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution without bias that keeps the size but for its stride, and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, momentum=None))  # statistics are plain means over all batches


def _write_resnet(models: Path, name: str) -> Path:
    """Write a random network, folded, as models/<name>/1/; return `models`."""
    torch.manual_seed(0)
    images = _photos(GOLDEN_IMAGES)
    normalize, network = Normalize(MEAN, STD), RESNETS[name]()
    with torch.no_grad():
        for part in np.array_split(images, 4):
            network.train()(normalize(torch.from_numpy(part).permute(0, 3, 1, 2)).float())
    folded = fold(network.eval())
    wanted = reference(Classifier(normalize, folded.unfolded), images)
    model = to_onnx(Classifier(normalize, folded.module), example=images[:2])
    manifest = Manifest(
        name=name,
        labels=tuple(f"class {index}" for index in range(CLASSES)),
        preprocessing=Preprocessing(mode="RGB", size=(SIDE, SIDE), mean=MEAN, std=STD),
        folds=folded.folds,
    )
    model.metadata_props.add(key=MANIFEST_KEY, value=manifest.model_dump_json())
    golden = Golden(tuple(encode_png(image) for image in images), images, wanted.logits, wanted.limit)
    folder = models / name / "1"
    folder.mkdir(parents=True)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    (folder / GOLDEN_FILE).write_bytes(golden.to_bytes())
    return models


def _photos(count: int) -> Pixels:
    """Return smooth seeded images with some noise, uint8 (count, SIDE, SIDE, 3): nearer to photos than noise is."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((count, 3, 8, 8), generator=generator)
    smooth = functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")
    noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    pixels: Pixels = (255 * noisy.clamp(0, 1)).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


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
    command = [sys.executable, __file__, "--memory-of", str(models / name / "1")]
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


def _cuda_classes(paths: dict[str, Path], names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Print, for each network and setting of cuDNN, the groups of batch sizes whose bits agree."""
    if not arguments.dry_run and (problem := cuda_problem()):
        sys.exit(f"CUDA cannot be had: {problem}")
    sizes_tried = range(1, 4) if arguments.dry_run else CUDA_SIZES
    searches = CUDA_SEARCHES[:1] if arguments.dry_run else CUDA_SEARCHES
    found = []
    print("model, algorithm search, use_tf32, prefer_nhwc: groups of batch sizes with equal bits")
    for name, search, tf32, nhwc in itertools.product(names, searches, "01", "01"):
        artifact = Artifact.load(paths[name] / name / "1")
        options = {"cudnn_conv_algo_search": search, "use_tf32": tf32, "prefer_nhwc": nhwc}
        groups: dict[str, list[int]] = {}
        providers: list[Any] = [("CPUExecutionProvider", {})] if arguments.dry_run else [(CUDA, options)]
        for size in sizes_tried:
            groups.setdefault(_bits(artifact, size, providers, max(sizes_tried)), []).append(size)
        classes = [{"sizes": sizes, "sound": not bits.startswith("unsound")} for bits, sizes in groups.items()]
        print(name, *options.values(), *(_sizes(one) for one in classes), flush=True)  # what is done outlives a timeout
        found.append({"model": name, **options, "classes": classes})
    # Not through the engine, which would switch TF32 off for the whole process.
    return {"environment": arithmetic_environment(), "cuda_classes": found}


def _bits(artifact: Artifact, size: int, providers: list[Any], count: int) -> str:
    """Return the digest of `count` images' logits at one batch size; one of its own where slot or restart matters."""
    images = np.resize(artifact.golden.pixels, (count, *artifact.golden.pixels.shape[1:]))
    images = images ^ np.arange(len(images), dtype=np.uint8)[:, None, None, None]  # repeated images differ
    digests = set()
    for rotations in ((0, 1, size // 2), (0,)):  # the second session is a restart
        options = onnxruntime.SessionOptions()
        options.use_deterministic_compute = True
        session = onnxruntime.InferenceSession(artifact.model_bytes, options, providers=providers)
        if session.get_providers()[0] != providers[0][0]:
            sys.exit("ONNX Runtime fell back to the CPU")
        for rotation in rotations:
            turned = np.roll(images, rotation, axis=0)
            parts = (fill(turned[at : at + size], size) for at in range(0, len(turned), size))
            logits = np.concatenate([session.run(None, {"image": part})[0] for part in parts])[: len(images)]
            digests.add(digest_of(np.roll(logits, -rotation, axis=0)))
    return digests.pop() if len(digests) == 1 else f"unsound at {size}"


def _sizes(one: dict[str, Any]) -> str:
    return ("{" if one["sound"] else "unsound {") + ",".join(str(size) for size in one["sizes"]) + "}"


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
