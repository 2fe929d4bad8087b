"""Give every known pattern to every tool that folds BatchNorm, and see who is right.

`python -m benchmarks.folding --out docs/folding.md`. Each tool runs in processes of its own, for some end theirs. What
is not installed is named and left out: `pip install onnxoptimizer onnxslim onnxsim` adds what foldserve does not need.
Ends with one JSON line, and with exit 1 where foldserve is not as it should be.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.fold_patterns import PATTERNS

TOOLS = ("foldserve", "torch.fx", "onnxscript", "onnxoptimizer", "onnxslim", "onnxsim", "onnxruntime")
SECONDS = 300  # a tool takes a few; one that hangs is a crash
HEADER = """# Who folds what

Each row is a small ONNX graph of `benchmarks/fold_patterns.py` with random numbers; each cell is what became of it.
**right**: nothing of the BatchNorm is left, and the answers are those of the unfolded file. **kept**: it is left, and
the answers are right. **wrong**: the answers differ by more than rounding. **crash**: an exception, or the process
ended. The second column is what is best: folding the rows that say kept would be wrong, or, after a ReLU, impossible.
torch.fx takes no ONNX file; it gets the same network as PyTorch modules.

Arithmetic on weights alone does not count as left.
Answers are compared on ONNX Runtime with every optimization off. onnxscript is what `torch.onnx.export` runs by
default. Made by `python -m benchmarks.folding --out docs/folding.md` with {versions}.

"""


def judge(tool: str) -> dict[int, dict[str, str]]:
    """Return a tool's verdict on each pattern, starting again after the one that ended its process."""
    answers: dict[int, dict[str, str]] = {}
    while len(answers) < len(PATTERNS):
        before = len(answers)
        command = [sys.executable, "-m", "benchmarks.fold_tools", tool, str(before)]
        try:
            out = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False).stdout
        except subprocess.TimeoutExpired as error:
            out = (error.stdout or b"").decode()
        for line in out.splitlines():
            if line.startswith("@"):
                answer = json.loads(line[1:])
                answers[answer["number"]] = answer
        if len(answers) == before:
            answers[before] = {"verdict": "crash", "detail": "the process ended before it began"}
    return answers


def table(verdicts: dict[str, dict[int, dict[str, str]]]) -> str:
    """Return the page."""
    tools = list(verdicts)
    lines = [f"| pattern | best | {' | '.join(tools)} | seen go wrong |", "|---" * (len(tools) + 3) + "|"]
    for number, pattern in enumerate(PATTERNS):
        best = "right" if pattern.folds else "kept"
        cells = [verdicts[tool][number]["verdict"] for tool in tools]
        cells = [f"**{cell}**" if cell in {"wrong", "crash"} else cell for cell in cells]
        lines.append("| " + " | ".join((pattern.name, best, *cells, pattern.seen)) + " |")
    for kind in ("right", "kept", "wrong", "crash"):
        counts = [sum(answer["verdict"] == kind for answer in verdicts[tool].values()) for tool in tools]
        lines.append(f"| *{kind}, of {len(PATTERNS)}* | | " + " | ".join(map(str, counts)) + " | |")
    sections = {"What stays, and foldserve's reason": details(verdicts, "kept"), "Crashes": details(verdicts, "crash")}
    rest = [line for title, found in sections.items() for line in ("", f"## {title}", "", *(found or ["None."]))]
    return HEADER.format(versions=versions()) + "\n".join([*lines, *rest]) + "\n"


def details(verdicts: dict[str, dict[int, dict[str, str]]], kind: str) -> list[str]:
    """Return what was said of each verdict of a kind, one line each."""
    return [
        f"- {tool}, {PATTERNS[number].name}: {answer['detail']}".replace("\n", " ").replace("foldserve, ", "")
        for tool, answers in verdicts.items()
        for number, answer in sorted(answers.items())
        if answer["verdict"] == kind and answer["detail"]
    ]


def versions() -> str:
    """Return the tools' versions."""
    names = ("torch", "onnxscript", "onnxoptimizer", "onnxslim", "onnxsim", "onnxruntime", "onnx")
    return ", ".join(f"{name} {number.split('+')[0]}" for name in names if (number := installed(name)))


def installed(name: str) -> str | None:
    """Return a package's version, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the page to write; without it, it is printed")
    arguments = parser.parse_args()
    present = [tool for tool in TOOLS if tool == "foldserve" or installed(tool.split(".")[0])]
    missing = sorted(set(TOOLS) - set(present))
    verdicts = {tool: judge(tool) for tool in present}
    page = table(verdicts)
    if arguments.out:
        arguments.out.write_text(page, encoding="utf-8")
    else:
        print(page)
    counts = {tool: Counter(answer["verdict"] for answer in verdicts[tool].values()) for tool in present}
    print(json.dumps({"patterns": len(PATTERNS), "missing": missing, **counts}))
    expected = ["right" if pattern.folds else "kept" for pattern in PATTERNS]
    return int([verdicts["foldserve"][number]["verdict"] for number in range(len(PATTERNS))] != expected)


if __name__ == "__main__":
    sys.exit(main())
