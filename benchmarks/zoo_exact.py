"""Convert the public classifier zoo to exact integers, or say why not: `python -m benchmarks.zoo_exact --out
docs/zoo-exact.md`.

Each network of `benchmarks.zoo` has seeded weights, and statistics warmed on smooth images, so bits, bounds and times
are real, while labels, a thousand near-ties, are not. Ends with one JSON line, and with exit 1 where a network neither
converts nor is refused.
"""

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch

from benchmarks.exact_networks import build_float, smooth_images
from benchmarks.zoo import ZOO, Export
from service.engine import Engine, choose_device, open_engine
from service.errors import NotExact
from training.errors import ExportRefused, NotConvertible, NotFoldable
from training.exact.checking import logits_of
from training.exact.convert import Converted, Material, convert

IMAGES = 64
TIMED = 9
HEADER = """# The zoo in exact integers

Every row is one public network with seeded random weights, exported by `torch.onnx.export(dynamo=True)`, folded, and
converted by `training.exact` with {images} smooth random images, without fine-tuning. *Converted* means: every sum is
below 2^24 by proof, and the float twin gave the bits of the integers on the images that the check reached, at least 8. Weights are worthless here, so a network's thousand logits lie close together and *same label* is a matter of
near-ties, not of accuracy; *error* is the mean squared error of the logits over their variance, which says how much
of the signal is kept (0: all). Accuracy of trained models: [exact.md](exact.md). *Headroom* is what the tightest
layer leaves of 24 bits, *times* the CPU time of the float form over that of the exact one, one image on one thread;
*made in* is CPU seconds.
Made by `python -m benchmarks.zoo_exact --out docs/zoo-exact.md` with {versions}.

| network | size | answer | layers | bits | headroom | same label | error | float ms | times | made in |
|---|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one network: `reason` where it was refused, numbers where it was converted."""

    export: Export
    verdict: str  # converted, refused or crashed
    reason: str = ""
    layers: int = 0
    bits: str = ""
    headroom_bits: float = 0.0
    agreement: float = 0.0
    error: float = 0.0
    float_ms: float = 0.0
    ratio: float = 0.0
    seconds: float = 0.0

    def line(self) -> str:
        """The row of the table."""
        cells = [f"{self.export.source} {self.export.network}", f"{self.export.size}²"]
        if self.verdict != "converted":
            return "| " + " | ".join([*cells, f"{self.verdict}: {self.reason}", *["–"] * 8]) + " |"
        numbers = (f"{100 * self.agreement:.0f} %", f"{self.error:.3f}", f"{self.float_ms:.2f}", f"{self.ratio:.2f} ×")
        room = f"{self.headroom_bits:.2f}"
        return (
            "| "
            + " | ".join([*cells, "converted", str(self.layers), self.bits, room, *numbers])
            + (f" | {self.seconds:.0f} s |")
        )


def convert_one(export: Export) -> Row:
    """Build, fold, convert and time one network."""
    images = smooth_images(IMAGES, export.size)
    try:
        floating = build_float(export.source, export.network, export.size, images).model
        started = time.process_time()
        converted = convert(floating, Material(images))
    except (NotConvertible, NotExact, NotFoldable, ExportRefused) as error:
        return Row(export, "refused", str(error))
    seconds = time.process_time() - started
    engines = [open_engine(one.SerializeToString(), choose_device("cpu")) for one in _both(floating, converted)]
    logits = [logits_of(engine, images) for engine in engines]
    float_ms, exact_ms = _cpu_ms(engines, images[:1])
    record = converted.record
    return Row(
        export, "converted", "",
        len(record.layers), "/".join(str(bits) for bits in sorted({one.weight_bits for one in record.layers})),
        converted.exactness.tightest.headroom_bits, record.agreement,
        float(((logits[1] - logits[0]) ** 2).mean() / logits[0].var()), float_ms, float_ms / exact_ms, seconds,
    )  # fmt: skip


def _both(floating: onnx.ModelProto, converted: Converted) -> Iterator[onnx.ModelProto]:
    yield from (floating, converted.model)


def _cpu_ms(engines: list[Engine], images: np.ndarray) -> tuple[float, float]:
    """Return the median CPU milliseconds of each engine, run in turn."""
    times: list[list[float]] = [[], []]
    for _ in range(TIMED + 1):
        for engine, seen in zip(engines, times, strict=True):
            started = time.process_time()
            engine.run(images)
            seen.append(1e3 * (time.process_time() - started))
    first, second = (float(np.median(seen[1:])) for seen in times)  # the first run warms up
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="Markdown file to write; printed as well")
    parser.add_argument("--only", nargs="*", help="names of networks [all]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the exporter's and timm's own
    wanted = {(one.source, one.network): one for one in ZOO if one.exporter == "dynamo" and one.opset == 20}
    rows = []
    for export in wanted.values():
        if arguments.only and export.network not in arguments.only:
            continue
        rows.append(_row(export))
        print(rows[-1].line(), flush=True)
        if arguments.out:
            arguments.out.write_text(_table(rows), encoding="utf-8")  # after each row: a whole run takes long
    verdicts = Counter(row.verdict for row in rows)
    print(json.dumps({"benchmark": "zoo_exact", "networks": len(rows), **verdicts}))
    sys.exit(1 if verdicts["crashed"] else 0)


def _table(rows: list[Row]) -> str:
    made_with = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "onnxruntime"))
    return HEADER.format(images=IMAGES, versions=made_with) + "\n".join(row.line() for row in rows) + "\n"


def _row(export: Export) -> Row:
    try:
        return convert_one(export)
    except Exception as error:  # noqa: BLE001 - whatever it is, the table shows it and the exit says so
        return Row(export, "crashed", f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")


if __name__ == "__main__":
    main()
