"""Accuracy and CPU time of exact models against the bits of their weights: `docs/exact.png`.

`python -m benchmarks.exact_picture --runs DIR --models DIR --speeds FILE`: runs and the models exported from them
under the same names, and the JSON line of `benchmarks.exact`. Prints test accuracies as one JSON line.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import onnx
import torch
from matplotlib import pyplot as plt

from service.artifact import Artifact
from training.exact.calibration import calibrate
from training.exact.checking import Labelled, accuracy, logits_of, open_model
from training.exact.convert import MOST_CALIBRATION
from training.exact.equalizing import equalize
from training.exact.grids import choose_grids
from training.exact.network import Network
from training.exact.quantizing import LARGEST_WEIGHTS
from training.exact.reading import read_network
from training.exact.settling import settle_tables
from training.exact.writing import write_exact
from training.run import load_run

BITS = tuple(limit.bit_length() + 1 for limit in LARGEST_WEIGHTS)
TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "sign-digits": "Sign digits (photographs)"}
INK, GREY, FLOAT, EXACT = "#1d2733", "#8b95a1", "#b9c2cc", "#0b7a75"
COLOURS = ("#0b7a75", "#d1495b", "#3d5a98")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run folders")
    parser.add_argument("--models", type=Path, default=Path("models"), help="repository with their models [models]")
    parser.add_argument("--speeds", type=Path, required=True, help="file with the JSON line of benchmarks.exact")
    parser.add_argument("--out", type=Path, default=Path("docs/exact.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {run.name: _accuracies(run, arguments.models / run.name / "1") for run in arguments.runs}
    print(json.dumps({"benchmark": "exact_picture", **found}), flush=True)
    _draw(found, json.loads(arguments.speeds.read_text()), arguments.out)


def _accuracies(run: Path, folder: Path) -> dict[str, float]:
    """Return the test accuracy of the float form, of the exact one as exported, and at each number of bits."""
    trained = load_run(run)
    test = Labelled(trained.dataset.test.images[:], trained.dataset.test.targets.astype(np.int64))
    models = {form: onnx.load_model_from_string(Artifact.load(folder, form).model_bytes) for form in ("float", "exact")}
    calibration = trained.dataset.training.images[:MOST_CALIBRATION]
    network = read_network(models["float"])
    evened, _ = equalize(network, calibrate(network, calibration))
    models |= {str(bits): _with_bits(evened, calibration, bits) for bits in BITS}
    reached = {name: accuracy(logits_of(open_model(model), test.images), test) for name, model in models.items()}
    return reached | {"images": len(test.targets)}


def _with_bits(network: Network, images: Any, bits: int) -> onnx.ModelProto:
    observed = calibrate(network, images)
    return write_exact(network, settle_tables(network, choose_grids(network, observed)), observed, bits)[0]


def _draw(found: dict[str, dict[str, float]], speeds: dict[str, Any], out: Path) -> None:
    mpl.rcParams |= {"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
                     "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": GREY}  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), dpi=160, width_ratios=(1, 1.05))
    _draw_accuracy(left, found)
    _draw_speed(right, [row for row in speeds["CPU time"] if row["batch"] == 8])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(w_pad=3.5)
    figure.savefig(out)


def _draw_accuracy(axes: Any, found: dict[str, dict[str, float]]) -> None:
    """Lose nothing, or how much: points of accuracy below the float form, with its own accuracy in the legend."""
    for colour, (name, reached) in zip(COLOURS, found.items(), strict=False):
        lost = [100 * (reached[str(bits)] - reached["float"]) for bits in BITS]
        label = f"{TITLES.get(name, name)}, float {100 * reached['float']:.2f} %"
        axes.plot(BITS, lost, "o-", color=colour, lw=2, ms=6, mec="white", label=label)
    axes.axhline(0, color=GREY, lw=1)
    axes.axhspan(-0.1, 0.1, color=EXACT, alpha=0.10, lw=0)
    axes.text(8, 0.12, "within 0.1 points", ha="left", va="bottom", color=EXACT, size=8)
    axes.set_xticks(BITS)
    axes.invert_xaxis()
    axes.set_xlabel("bits of the weights (activations: 8)")
    axes.set_ylabel("points of test accuracy, exact − float")
    axes.set_title("Accuracy, without fine-tuning", loc="left", weight="bold", size=11)
    axes.legend(frameon=False, loc="lower left", fontsize=9)


def _draw_speed(axes: Any, rows: list[dict[str, Any]]) -> None:
    places = np.arange(len(rows))[::-1]
    shares = [row["exact_ms"] / row["float_ms"] for row in rows]
    axes.barh(places + 0.19, [1] * len(rows), 0.34, color=FLOAT, label="float32, folded")
    axes.barh(places - 0.19, shares, 0.34, color=EXACT, label="exact, int8")
    for place, share, row in zip(places, shares, rows, strict=True):
        axes.text(0.99, place + 0.19, f"{row['float_ms']:.3g} ms", ha="right", va="center", size=8.5)
        said = f"{row['exact_ms']:.3g} ms, {row['ratio']:.1f} × faster"
        axes.text(share + 0.02, place - 0.19, said, ha="left", va="center", size=8.5, color=EXACT, weight="bold")
    axes.set_yticks(places, [TITLES.get(row["model"], row["model"]) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("CPU time per image, float form = 1 (one thread, batch 8)")
    axes.set_title("Time", loc="left", weight="bold", size=11)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.28, 0.99), ncols=2, fontsize=9)


if __name__ == "__main__":
    main()
