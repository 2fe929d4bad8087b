"""Exact models: the same bits wherever sums are sums, how fast, how long the making takes, what accuracy is left.

`python -m benchmarks.exact --models DIR` prints tables and one line of JSON. DIR holds models written by `foldserve
export` (`--model NAME` of them, MNIST's by default); networks of 224 × 224 have seeded worthless weights. OpenVINO and
torchvision take part where they are installed; `--cuda` runs the float twin on CUDA instead, and nothing else.
"""

import argparse
import cProfile
import json
import os
import platform
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from benchmarks.exact_networks import FloatModel, build_float, smooth_images
from benchmarks.exact_runtimes import Way, onnxruntime_ways, openvino_ways, session, torch_ways
from service.artifact import Artifact
from service.engine import choose_device, open_engine
from service.executions import float_twin
from service.independence.exactness import prove_exact, reference_logits
from service.integers import read_steps
from training.exact.convert import Converted, Material, convert

BATCHES = (1, 2, 3, 7, 8, 16, 33, 64)
SIDE = 224
NETWORKS = {
    "ResNet-18": ("own", "resnet18"),
    "ResNet-50": ("own", "resnet50"),
    "MobileNetV2": ("torchvision", "mobilenet_v2"),
    "EfficientNet-B0": ("torchvision", "efficientnet_b0"),
}
SPREAD = 64  # images with which networks are converted
CONVERSION = {"calibrate", "choose_grids", "settle_tables", "write_exact", "check_executions", "reference_logits"}

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Difference:
    """How many logits of one way had other bits than the integers, over all batch sizes; `breaks` as in Way."""

    model: str
    runtime: str
    how: str
    compared: int
    differing: int
    breaks: str


@dataclass(frozen=True, slots=True)
class Speed:
    """CPU milliseconds an image on one thread: medians of interleaved runs, and the median and span of the ratios."""

    model: str
    batch: int
    float_ms: float
    exact_ms: float
    twin_ms: float
    ratio: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class Making:
    """Seconds from a folded network to its exact form, in all and by function, and of the proof when it is loaded."""

    model: str
    convert_s: float
    convert_cpu_s: float
    split_s: dict[str, float]
    proof_s: float
    checked_images: int
    headroom_bits: float
    agreement: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="repository with exact models [models]")
    parser.add_argument("--model", default="mnist", help="the one that is compared across runtimes [mnist]")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="of 224 × 224 [all]")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved runs; medians are printed [9]")
    parser.add_argument("--keep", type=Path, help="folder where converted networks are kept between runs")
    parser.add_argument("--parts", nargs="*", default=["bits", "speed"], choices=("bits", "speed"), help="[both]")
    parser.add_argument("--cuda", action="store_true", help="only the float twin on CUDA: float32, TF32 and NHWC")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    demo = arguments.models / arguments.model / "1"
    if arguments.cuda:
        found: dict[str, list[Any]] = {"bits": list(_compare(arguments.model, *_stored(demo), cuda_ways))}
    else:
        found = _measure(demo, arguments)
    for title, rows in found.items():
        _print(title, rows)
    rows = {title: [asdict(row) for row in found] for title, found in found.items()}
    print(json.dumps({"benchmark": "exact", **_machine(), "repeats": arguments.repeats, **rows}))
    broken = [row for row in found["bits"] if row.differing and not row.breaks] if "bits" in found else []
    sys.exit(1 if broken else 0)


def _measure(demo: Path, arguments: argparse.Namespace) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    if "bits" in arguments.parts:
        found["bits"] = list(_compare(demo.parent.name, *_stored(demo), cpu_ways))
    if "speed" not in arguments.parts:
        return found
    images = Artifact.load(demo, "exact").golden.pixels
    forms = [(Artifact.load(demo, form)).model_bytes for form in ("float", "exact")]
    speeds = [_speed(demo.parent.name, *forms, images[:1].repeat(size, 0), arguments.repeats) for size in (1, 8)]
    makings = []
    for name in arguments.networks:
        floating, made, making = _converted(name, arguments.keep)
        makings += [making] if making else []
        print(making or f"{name}: kept from an earlier run", flush=True)  # minutes of work: shown before the table
        sizes = (smooth_images(size, SIDE, seed=1) for size in (1, 8))
        speeds += [_speed(name, floating, made, images, arguments.repeats) for images in sizes]
    return found | {"CPU time": speeds, "making": makings}


def _stored(folder: Path) -> tuple[onnx.ModelProto, Pixels]:
    """Return a stored exact model, and 577 images for it: the golden ones and others made of them, noise, and ends."""
    artifact = Artifact.load(folder, "exact")
    real = artifact.golden.pixels
    generator = np.random.default_rng(0)
    shape = real.shape[1:]
    turned = [np.roll(real, (dx, dy), axis=(1, 2)) for dx, dy in generator.integers(-3, 4, (19, 2))]
    noise = generator.integers(0, 256, (256, *shape), dtype=np.uint8)
    ends = np.full((1, *shape), 255, np.uint8)
    return onnx.load_model_from_string(artifact.model_bytes), np.concatenate([real, *turned, noise, ends])


def cpu_ways(model: onnx.ModelProto) -> Iterator[Way]:
    """Yield every way to run the model that this machine's CPU has."""
    steps = read_steps(model)
    yield from onnxruntime_ways(model)
    yield from torch_ways(steps)
    yield from openvino_ways(float_twin(model), steps)


def cuda_ways(model: onnx.ModelProto) -> Iterator[Way]:
    """Yield the float twin on CUDA, with TF32 and NHWC on and off. TF32 is the process's own matter there."""
    content = float_twin(model).SerializeToString()
    for search in ("HEURISTIC", "EXHAUSTIVE", "DEFAULT"):
        for tf32 in ("0", "1"):
            for nhwc in ("0", "1"):
                options = {"cudnn_conv_algo_search": search, "use_tf32": tf32, "prefer_nhwc": nhwc}
                run = session(content, providers=[("CUDAExecutionProvider", options)])
                yield Way("ONNX Runtime, CUDA", f"{search}, TF32 {tf32}, NHWC {nhwc}", run)


def _compare(
    name: str, model: onnx.ModelProto, images: Pixels, ways: Callable[[onnx.ModelProto], Iterator[Way]]
) -> Iterator[Difference]:
    """Yield for each way how many logits differ in a bit from the integers', over all images and batch sizes."""
    wanted = reference_logits(read_steps(model), images).view(np.uint32)
    for way in ways(model):
        differing = 0
        for size in BATCHES:
            parts = [way.run(images[at : at + size]) for at in range(0, len(images), size)]
            differing += int((np.concatenate(parts).view(np.uint32) != wanted).sum())
        yield Difference(name, way.runtime, way.how, wanted.size * len(BATCHES), differing, way.breaks)


def _converted(name: str, keep: Path | None) -> tuple[bytes, bytes, Making | None]:
    """Return a network of 224 × 224, float and exact, and what making it took; None where it was kept."""
    paths = [keep / f"{name}-{form}.onnx" for form in ("float", "exact")] if keep else []
    if paths and all(path.exists() for path in paths):
        return paths[0].read_bytes(), paths[1].read_bytes(), None
    source = build_float(*NETWORKS[name], SIDE, smooth_images(SPREAD, SIDE))
    converted, making = _timed_conversion(name, source)
    contents = source.model.SerializeToString(), converted.model.SerializeToString()
    for path, content in zip(paths, contents, strict=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return *contents, making


def _timed_conversion(name: str, source: FloatModel) -> tuple[Converted, Making]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    profile = cProfile.Profile()
    started, cpu_started = time.monotonic(), time.process_time()
    converted = profile.runcall(convert, source.model, Material(source.images))
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    torch.set_num_threads(1)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]  # typeshed lacks it: place → (…, cumulative, …)
    split = {place[2]: round(numbers[3], 1) for place, numbers in stats.items() if place[2] in CONVERSION}
    content = converted.model.SerializeToString()
    started = time.monotonic()
    exactness = prove_exact(read_steps(onnx.load_model_from_string(content)))
    proof_s = time.monotonic() - started
    record, room = converted.record, exactness.tightest.headroom_bits
    return converted, Making(name, seconds, cpu_seconds, split, proof_s, record.checked_images, room, record.agreement)


def _speed(name: str, floating: bytes, exact: bytes, images: Pixels, repeats: int) -> Speed:
    """Return CPU time of the float form, the exact one and its twin, opened as the service opens them."""
    twin = float_twin(onnx.load_model_from_string(exact)).SerializeToString()
    engines = [open_engine(content, choose_device("cpu")) for content in (floating, exact, twin)]
    rounds = max(1, 256 // images[0].shape[0] // len(images))  # small images, many runs: a clock ticks in milliseconds
    times = []
    for repeat in range(repeats + 1):
        order = range(3) if repeat % 2 else reversed(range(3))
        row = [0.0, 0.0, 0.0]
        for which in order:
            started = time.process_time()
            for _ in range(rounds):
                engines[which].run(images)
            row[which] = (time.process_time() - started) / rounds / len(images) * 1e3
        times.append(row)
    seen = np.array(times[1:])  # the first round warms up
    ratios = seen[:, 0] / seen[:, 1]
    medians = (float(value) for value in np.median(seen, axis=0))
    return Speed(name, len(images), *medians, float(np.median(ratios)), float(ratios.min()), float(ratios.max()))


def _print(title: str, rows: list[Any]) -> None:
    print(f"\n{title}", flush=True)
    if not rows:
        print("  nothing")
        return
    cells = [list(asdict(rows[0])), *([_cell(value) for value in asdict(row).values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number:g}" for key, number in value.items())
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    vnni = any("vnni" in line for line in lines if line.startswith("flags"))
    versions = {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    try:
        versions["openvino"] = version("openvino")
    except PackageNotFoundError:
        print("skipped: OpenVINO is not installed", file=sys.stderr)
    return {"processor": processor, "vnni": vnni, "cores": len(os.sched_getaffinity(0)), **versions}


if __name__ == "__main__":
    main()
