"""Prove the public classifier zoo, or list what stops the proof: `python -m benchmarks.zoo_proof --out
docs/zoo-proof.md`.

Exports each network of `benchmarks.zoo` with random weights (kept in `--folder`, so a second run is quick),
proves it, and writes a table. Ends with one JSON line, and with exit 1 where a file is not proved.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx

from benchmarks.zoo import ZOO, Export, declare_missing_operators, write
from service.independence.proof import Verdict, prove

HEADER = """# The zoo, proved

Every row is one exported file: network, exporter, opset, and what `service.independence.proof` says of it.
Weights are random; the proof reads the graph alone. `dynamo` is `torch.onnx.export(dynamo=True)`, `script`
the older exporter. Made by `python -m benchmarks.zoo_proof --out docs/zoo-proof.md`{versions}.

| network | exporter | opset | input | nodes seen | operators | verdict |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One file and its verdict."""

    export: Export
    operators: int
    verdict: Verdict
    seconds: float

    def line(self) -> str:
        """The row of the table."""
        export, found = self.export, self.verdict
        proved = found.verdict == "independent"
        answer = "proved" if proved else f"{found.verdict}: {found.reason}"
        network, size = f"{export.source} {export.network}", f"N × 3 × {export.size} × {export.size}"
        cells = (network, export.exporter, export.opset, size, found.nodes_seen, self.operators, answer)
        return "| " + " | ".join(str(cell) for cell in cells) + " |"


def prove_file(export: Export, path: Path) -> Row:
    """Prove one file."""
    model = onnx.load(path, load_external_data=False)
    started = time.perf_counter()
    verdict = prove(model)
    seconds = time.perf_counter() - started
    return Row(export, len({node.op_type for node in model.graph.node}), verdict, seconds)


def table(rows: list[Row]) -> str:
    """The page: header, rows, and the count of each verdict."""
    packages = ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("torch", "torchvision", "timm", "onnx"))
    counts = Counter(row.verdict.verdict for row in rows)
    total = f"{counts['independent']} proved, {counts['mixed']} mixed, {counts['unproven']} unproven"
    slowest = max(row.seconds for row in rows)
    end = f"\n**{len(rows)} files: {total}.** The slowest proof took {slowest * 1000:.0f} ms.\n"
    return HEADER.format(versions=f" with {packages}") + "\n".join(row.line() for row in rows) + "\n" + end


def main() -> int:
    """Write the table; 1 where a file is not proved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "foldserve-zoo", help="exported files"
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    library = declare_missing_operators()
    rows = [prove_file(export, write(export, arguments.folder)) for export in ZOO]
    del library
    arguments.out.write_text(table(rows), encoding="utf-8")
    verdicts = Counter(row.verdict.verdict for row in rows)
    print(json.dumps({"files": len(rows), **verdicts, "slowest_s": round(max(row.seconds for row in rows), 4)}))
    return int(set(verdicts) != {"independent"})


if __name__ == "__main__":
    sys.exit(main())
