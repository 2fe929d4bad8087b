"""Logits to labels: pure functions on arrays. Knows no model, no web."""

from dataclasses import dataclass
from math import exp, fsum

import numpy as np
from numpy.typing import NDArray

FEW_CLASSES = 100  # up to so many, lists take less than NumPy takes to get the interpreter back


@dataclass(frozen=True, slots=True)
class Candidate:
    """One class that an image may be; `score` is its softmax probability, 0 to 1."""

    label: str
    index: int
    score: float


def top_k(logits: NDArray[np.float32], labels: tuple[str, ...], k: int) -> list[Candidate]:
    """Return the k most probable classes of one image, as `rank` does, with their names."""
    return [Candidate(labels[index], index, score) for index, score in rank(logits, k)]


def rank(logits: NDArray[np.float32], k: int) -> list[tuple[int, float]]:
    """Return index and score of the k most probable classes of one image, most probable first, ties by the lower index.

    Shapes: logits (K,). The softmax is taken in float64, of this image alone, so no batch can touch it.
    """
    return _rank_few(logits.tolist(), k) if len(logits) <= FEW_CLASSES else _rank_many(logits, k)


def _rank_few(logits: list[float], k: int) -> list[tuple[int, float]]:
    largest = max(logits)
    weights = [exp(one - largest) for one in logits]
    total = fsum(weights)
    order = sorted(range(len(logits)), key=logits.__getitem__, reverse=True)  # by logit: scores may underflow to ties
    return [(index, weights[index] / total) for index in order[:k]]


def _rank_many(logits: NDArray[np.float32], k: int) -> list[tuple[int, float]]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-logits, kind="stable")[:k]
    scores = weights[order] / weights.sum()
    return list(zip(order.tolist(), scores.tolist(), strict=True))
