"""What a classifier gets right, wrong, and how much its confidence is worth; arrays in, records out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15  # as Guo et al. 2017 (arXiv 1706.04599) count


@dataclass(frozen=True, slots=True)
class ClassScore:
    """Of one class, 0 to 1; `precision` is None where nothing was called so, `recall` and `f1` where nothing is."""

    label: str
    images: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidence against accuracy in bins of equal width; bins without images hold 0.

    `error` is the expected calibration error: Σ images in bin / all · |accuracy − confidence| (Guo et al. 2017, eq. 3);
    `largest` is the largest such gap (eq. 5).
    """

    edges: NDArray[np.float64]  # (bins + 1,)
    counts: NDArray[np.int64]  # (bins,)
    confidence: NDArray[np.float64]  # (bins,) mean
    accuracy: NDArray[np.float64]  # (bins,)
    error: float
    largest: float


def probabilities(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return softmax of logits (N, classes), as the service computes it: in float64."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def confusion(targets: NDArray[np.int64], guesses: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Return counts (classes, classes): rows are what images are, columns what they were called."""
    return np.bincount(targets * classes + guesses, minlength=classes * classes).reshape(classes, classes)


def class_scores(matrix: NDArray[np.int64], labels: Sequence[str]) -> list[ClassScore]:
    """Return precision, recall and F1 of each class of a confusion matrix."""
    scores = []
    for index, label in enumerate(labels):
        right, called, there = (
            int(count) for count in (matrix[index, index], matrix[:, index].sum(), matrix[index].sum())
        )
        f1 = 2 * right / (called + there) if there else None
        scores.append(
            ClassScore(label, there, right / called if called else None, right / there if there else None, f1)
        )
    return scores


def calibration(confidences: NDArray[np.float64], is_right: NDArray[np.bool_], bins: int = BINS) -> Calibration:
    """Return how far confidence, 0 to 1, is from accuracy; a bin holds its upper edge, the first holds 0 too."""
    edges = np.linspace(0, 1, bins + 1)
    places = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    filled = np.maximum(counts, 1)
    confidence = np.bincount(places, weights=confidences, minlength=bins) / filled
    accuracy = np.bincount(places, weights=is_right, minlength=bins) / filled
    gaps = np.abs(accuracy - confidence)
    error = float((gaps * counts).sum() / max(counts.sum(), 1))
    return Calibration(edges, counts, confidence, accuracy, error, float(gaps.max()))


def worst(chances: NDArray[np.float64], targets: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return indices of the images whose own class got the least probability of (N, classes), the worst first."""
    own = chances[np.arange(len(targets)), targets]
    return np.argsort(own, kind="stable")[:count]
