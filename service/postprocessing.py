"""Logits to labels: pure functions on arrays. Knows no model, no web."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
    order = np.argsort(-logits, kind="stable")[:k]  # by logit, since scores may underflow to ties
    return [Candidate(labels[index], index, float(scores[index])) for index in order.tolist()]
