"""Import the public classifier zoo, or list what stops it: `python -m benchmarks.zoo_import --out docs/zoo-import.md`.

Each network of `benchmarks.zoo` gets seeded weights and warmed statistics, is exported with BatchNorm left in,
imported, proved, certified on this machine and answered over HTTP by the real application. One process a network, so
that one failure is one row. Needs torch, torchvision, timm and onnxscript.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.zoo import ZOO, Export, build, declare_missing_operators

HEADER = """# The zoo, imported

Every row is one network with seeded random weights and BatchNorm statistics warmed on the images of the check, exported
by the dynamo exporter with its optimizer, but for the rules that fold BatchNorm, then taken by `foldserve import`:
examined, folded, proved independent of the batch, held against float64 at batch 1, 2, 7 and 64, written, loaded and
served over HTTP.
`difference` is ONNX Runtime's largest logit difference to the unfolded network in float64, `float32` what rounding
costs without folding. An application that certifies batches of 1 and 2 serves it. Latency is the median of {runs} runs
of one image on one thread, file and artifact in turn; the machine was busy with other work, so only the ratio tells.
ONNX Runtime folds what it can of the file by itself when it loads it; the artifact also turns bytes into floats.
Made by `python -m benchmarks.zoo_import --out docs/zoo-import.md` with {packages}.

| network | input | nodes | after | BatchNorm | left | difference | float32 | MB | ms before | ms after | served |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""
RUNS = 15
MOST_TOGETHER = 2  # sizes to certify: the probe of larger ones takes minutes for a large network
WARMING = 40
WARMED_TOGETHER = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Row:
    """One network: what came out of it, or what stopped it."""

    network: str
    size: int
    nodes: int = 0
    nodes_after: int = 0
    norms: int = 0
    left: int = 0
    difference: float = 0.0
    noise: float = 0.0
    megabytes: float = 0.0
    before_ms: float = 0.0
    after_ms: float = 0.0
    served: str = ""
    stopped: str = ""

    def line(self) -> str:
        """The row of the table."""
        if self.stopped:
            return f"| {self.network} | {self.size} | " + " | " * 9 + f"stopped: {self.stopped} |"
        numbers = (
            f"{self.nodes} | {self.nodes_after} | {self.norms} | {self.left} | {self.difference:.1e} | "
            f"{self.noise:.1e} | {self.megabytes:.1f} | {self.before_ms:.1f} | {self.after_ms:.1f}"
        )
        return f"| {self.network} | {self.size} | {numbers} | {self.served} |"


def warm(model: Any, size: int) -> None:
    """Give BatchNorm statistics of its own network, a mean over some images of the check, and no γ or head of zeros.

    With statistics of other images the answers of random weights may explode, and a row would prove little.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from service.preprocessing import Preprocessing
    from training.importing.images import synthetic_images

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not bool(module.weight.any()):  # ViT's head: every logit would be 0
            torch.nn.init.normal_(module.weight, std=0.02)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for module in norms:
        module.momentum = None
        module.train()
        if module.affine and not bool(module.weight.any()):  # timm starts a residual block's last γ at 0
            torch.nn.init.ones_(module.weight)
    spec = Preprocessing(mode="RGB", size=(size, size), mean=MEAN, std=STD)
    pixels = torch.from_numpy(synthetic_images(spec, 2 * WARMED_TOGETHER)).permute(0, 3, 1, 2).float() / 255
    images = (pixels - torch.tensor(MEAN).reshape(-1, 1, 1)) / torch.tensor(STD).reshape(-1, 1, 1)
    with torch.no_grad():
        for part in images.split(WARMED_TOGETHER):
            model(part)
        for module in norms:
            module.num_batches_tracked.fill_(WARMING)
            module.momentum = 0.1
    model.eval()


def write_with_norms(export: Export, path: Path) -> None:
    """Export by dynamo as people do, with the exporter's optimizer, but for its rules that fold BatchNorm."""
    import onnx
    import torch

    model = build(export)
    warm(model, export.size)
    images = torch.zeros(2, 3, export.size, export.size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (images,), dynamo=True, opset_version=export.opset, optimize=False, verbose=False,
            input_names=["x"], output_names=["scores"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
        optimize(program.model)
    onnx.save(program.model_proto, path)


def optimize(model: Any) -> None:
    """Do what the exporter's own optimizer does, without `_fuse_batchnorm`."""
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import _fuse_batchnorm

    folding = list(_fuse_batchnorm.rules)
    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule not in folding]  # noqa: SLF001 - no public list
    for _ in range(2):  # as the exporter does: one rewriting opens the way for another
        optimizer.fold_constants(model)
        optimizer.remove_unused_nodes(model)
        rewriter.rewrite(model, pattern_rewrite_rules=rules)
    optimizer.remove_unused_nodes(model)


def medians_ms(runs: tuple[Callable[[], Any], ...]) -> list[float]:
    """Median milliseconds of each, run in turn, so that a neighbour on the machine slows all of them alike."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(RUNS + 1):
        for run, seen in zip(runs, times, strict=True):
            started = time.perf_counter()
            run()
            seen.append(time.perf_counter() - started)
    return [1000 * float(np.median(seen[1:])) for seen in times]  # the first run warms up


def served(models: Path, encoded: bytes, expected: int) -> str:
    """Start the application in strict mode, which certifies, and ask it; say what came."""
    from starlette.testclient import TestClient

    from service.app import create_app
    from service.config import Settings

    with TestClient(create_app(Settings(models=models, device="cpu", max_batch_size=MOST_TOGETHER))) as client:
        ends = time.monotonic() + 300
        while client.get("/readyz").status_code != 200 and time.monotonic() < ends:
            time.sleep(0.2)  # between two looks
        answer = client.post("/predict", content=encoded, headers={"content-type": "image/png"})
    if answer.status_code != 200:
        return f"refused: {answer.json().get('detail', answer.status_code)}"
    return "certified" if answer.json()["predictions"][0]["index"] == expected else "another label"


def one(export: Export, folder: Path) -> Row:
    """Export one network and take it the whole way."""
    path = folder / "network.onnx"
    write_with_norms(export, path)
    return taken(path, f"{export.source} {export.network}", MEAN, STD, folder)


def taken(path: Path, label: str, mean: tuple[float, ...], std: tuple[float, ...], folder: Path) -> Row:
    """Take one file the whole way: imported, timed, certified, served."""
    import onnx

    from service.artifact import Artifact
    from service.engine import choose_device, open_engine
    from training.importing.interface import read_interface
    from training.importing.original import inputs_for
    from training.importing.pipeline import Order, import_model
    from training.importing.preprocessing import Wishes

    exported = import_model(Order(path, "network", Wishes(mean=mean, std=std)), folder / "models", say=lambda _: None)
    artifact = Artifact.load(exported.folder)
    before, after = onnx.load(path), onnx.load(exported.folder / "model.onnx")
    pixels, device = artifact.golden.pixels[:1], choose_device("cpu")
    floats = np.ascontiguousarray(inputs_for(pixels, read_interface(before), artifact.manifest.preprocessing))
    norms = {record.norm for record in (*exported.manifest.folds, *exported.manifest.kept)}
    return Row(
        label, pixels.shape[1], len(before.graph.node), len(after.graph.node), len(norms), len(exported.manifest.kept),
        exported.parity.max_abs_difference, exported.parity.float32_noise, exported.bytes / 1e6,
        *medians_ms((
            partial(open_engine(path.read_bytes(), device).run, floats),
            partial(open_engine(artifact.model_bytes, device).run, pixels),
        )),
        served(folder / "models", artifact.golden.encoded[0], int(artifact.golden.logits_float64[0].argmax())),
    )  # fmt: skip


def of_file(path: Path, mean: float, std: float) -> Row:
    """Take a file that lies here already."""
    with tempfile.TemporaryDirectory() as folder:
        return taken(path, path.stem.replace("_", " ", 1), (mean,), (std,), Path(folder))


def child(index: int) -> int:
    """Print one row as JSON."""
    import torch

    torch.set_num_threads(1)
    export = ZOO[index]
    library = declare_missing_operators()
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = one(export, Path(folder))
        except Exception as error:  # noqa: BLE001 - whatever stops a network is its row
            reason = str(error).replace(folder, "").strip().partition("\n")[0]
            row = Row(f"{export.source} {export.network}", export.size, stopped=f"{type(error).__name__}: {reason}")
    del library
    print(json.dumps(asdict(row)))
    return 0


def page(rows: list[Row]) -> str:
    """The page: header, rows, and what they come to."""
    names = ("torch", "torchvision", "timm", "onnx", "onnxruntime")
    packages = ", ".join(f"{name} {version(name).split('+')[0]}" for name in names)
    good = [row for row in rows if not row.stopped]
    certified = sum(row.served == "certified" for row in good)
    total = f"{len(rows)} networks: {len(good)} imported, {certified} certified and served"
    norms, left = sum(row.norms for row in good), sum(row.left for row in good)
    end = f"\n**{total}; {norms} BatchNorms, {left} left.**\n"
    lines = "\n".join(row.line() for row in rows)
    return HEADER.format(packages=packages, runs=RUNS) + lines + "\n" + end


def by_cost() -> list[tuple[int, Export]]:
    """The list with the quick networks first, so that a run that is cut short has most of them."""
    slow = ("50", "101", "121", "v2_s", "vgg", "inception", "vit", "swin", "dla", "convnext_tiny", "nf_", "googlenet")
    return sorted(enumerate(ZOO), key=lambda pair: any(word in pair[1].network for word in slow))


def main() -> int:
    """Write the table; 1 where a network was stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the page to write; needed unless --one or --file is given")
    parser.add_argument("--one", type=int, help="one network by its place in the list, as JSON")
    parser.add_argument("--file", type=Path, help="a file that is there already, as one row")
    parser.add_argument("--mean", type=float, default=0.0, help="of the file, for pixels 0–1 [0]")
    parser.add_argument("--std", type=float, default=1.0, help="of the file, for pixels 0–1 [1]")
    parser.add_argument("--timeout-s", type=int, default=600, help="for one network")
    arguments = parser.parse_args()
    if arguments.file is not None:
        print(of_file(arguments.file, arguments.mean, arguments.std).line())
        return 0
    if arguments.one is not None:
        return child(arguments.one)
    if arguments.out is None:
        parser.error("--out is missing: the page to write")
    rows = []
    seen = set()
    for index, export in by_cost():
        if (export.source, export.network) in seen or export.exporter != "dynamo":
            continue
        seen.add((export.source, export.network))
        command = [sys.executable, "-m", "benchmarks.zoo_import", "--one", str(index)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout_s, check=False)
            rows.append(Row(**json.loads(done.stdout.splitlines()[-1])))
        except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
            rows.append(Row(f"{export.source} {export.network}", export.size, stopped=type(error).__name__))
        print(rows[-1].line(), flush=True)
        arguments.out.write_text(page(rows), encoding="utf-8")
    print(json.dumps({"networks": len(rows), "stopped": sum(bool(row.stopped) for row in rows)}))
    return int(any(row.stopped for row in rows))


if __name__ == "__main__":
    sys.exit(main())
