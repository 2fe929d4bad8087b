"""Logits to labels: pure functions on arrays. Knows no model, no web."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEW_CLASSES = 100  # up to so many, sorting a list takes less than NumPy takes to get the interpreter back


@dataclass(frozen=True, slots=True)
class Candidate:
    """One class that an image may be; `score` is its softmax probability, 0 to 1."""

    label: str
    index: int
    score: float


def top_k(logits: NDArray[np.float32], labels: tuple[str, ...], k: int) -> list[Candidate]:
    """Return the k most probable classes of one image, most probable first, ties by the lower index.

    Shapes: logits (K,). The softmax is taken in float64, of this image alone, so no batch can touch it.
    """
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    weights = np.exp(shifted)
    scores = weights / weights.sum()
    order = _order(logits)[:k]  # by logit, since scores may underflow to ties
    return [Candidate(labels[index], index, float(scores[index])) for index in order]


def _order(logits: NDArray[np.float32]) -> list[int]:
    """Return the indices of logits (K,) from the largest to the least, ties by the lower index."""
    if len(logits) > FEW_CLASSES:
        order: list[int] = np.argsort(-logits, kind="stable").tolist()
        return order
    values = logits.tolist()  # NumPy's sort lets go of the interpreter, and to get it back takes longer than to sort
    return sorted(range(len(values)), key=values.__getitem__, reverse=True)
