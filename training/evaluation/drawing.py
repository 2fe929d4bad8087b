"""The pictures of an evaluation: confusion matrix, reliability diagram, the images that went worst."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.evaluation.measures import Calibration
from training.pictures import COLOURS, DOTS_PER_INCH, INK, figure, percent, png

MOST_NUMBERED = 20  # classes, beyond which numbers in the cells cannot be read
COLUMNS = 8


def draw_confusion(matrix: NDArray[np.int64], labels: Sequence[str]) -> bytes:
    """Return a PNG of a confusion matrix; the shade is the share of the row, the numbers are images."""
    side = float(np.clip(0.55 * len(labels) + 1.8, 4.5, 12))
    canvas, axes = figure("Confusion matrix", width=side + 0.4, height=side)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares**0.5, cmap="Blues", vmin=0, vmax=1)  # the root lets one image in a hundred be seen
    axes.grid(visible=False)
    axes.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, labels)) > 3 else 0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("called")
    axes.set_ylabel("is")
    if len(labels) <= MOST_NUMBERED:
        for (row, column), count in np.ndenumerate(matrix):
            colour = "white" if shares[row, column] > 0.3 else INK
            axes.text(column, row, f"{count:,}" if count else "", ha="center", va="center", fontsize=8, color=colour)
    return png(canvas)


def draw_reliability(found: Calibration) -> bytes:
    """Return a PNG of accuracy over confidence; bars on the diagonal are what confidence promises."""
    canvas, axes = figure(f"Reliability: expected calibration error {found.error:.2%}", width=5.4, height=4.6)
    width = 1 / len(found.counts)
    filled = found.counts > 0
    middles = (found.edges[:-1] + found.edges[1:]) / 2
    axes.bar(
        middles[filled], found.accuracy[filled], width=width * 0.92, color=COLOURS[0], alpha=0.85, label="accuracy"
    )
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1.2, linestyle="--", label="as confident as right")
    for middle, accuracy, count in zip(middles[filled], found.accuracy[filled], found.counts[filled], strict=True):
        axes.text(middle, accuracy + 0.015, f"{count:,}", ha="center", fontsize=7, color="#555555")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.08)
    percent(axes, decimals=0)
    axes.set_xlabel("confidence of the answer (numbers: images)")
    axes.set_ylabel("share that was right")
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)  # off the bars
    return png(canvas)


def draw_worst(images: NDArray[np.uint8], captions: Sequence[str]) -> bytes:
    """Return a PNG of images (N, height, width, channels), each under its caption."""
    rows = -(-len(images) // COLUMNS)
    canvas = Figure(figsize=(1.15 * COLUMNS, 1.5 * rows), dpi=DOTS_PER_INCH, layout="constrained")
    for index, axes in enumerate(canvas.subplots(rows, COLUMNS, squeeze=False).flat):
        axes.axis("off")
        if index < len(images):
            axes.imshow(images[index].squeeze(), cmap="gray", vmin=0, vmax=255)
            axes.set_title(captions[index], fontsize=8, color=INK)
    return png(canvas)
