"""What a certificate says of an exact model: *by theorem*, and how the theorem's premise was looked at.

The theorem needs kernels that sum products in at least 24 bits. Integer kernels that don't saturate do; float kernels
may transform (Winograd, FFT) or round between (bfloat16, float16). So each shape that may run is held against the
integers themselves, on images of every kind.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from service.artifact import Artifact
from service.engine import Shape
from service.independence.exactness import THEOREM_VERSION, Exactness, prove_exact, reference_logits
from service.independence.fingerprint import digest_of_json
from service.independence.probe import Report, Run, fill, same_bits
from service.independence.probe_images import Pixels, probe_images
from service.integers import Steps, read_steps

STATEMENT = (
    "by theorem: every partial sum, in any order, is an integer below 2^24, and every other operation is exact or one "
    "correctly rounded operation, so the logits are a function of the pixels and the file alone"
)
PREMISE = "the kernels sum products in at least 24 bits; each shape that may run was held against the integers"
BUDGET_S = 10.0  # for the integers, which NumPy computes
FEWEST, MOST = 8, 64


@dataclass(frozen=True, slots=True)
class Theorem:
    """What holds of an exact file wherever its sums are sums."""

    steps: Steps
    exactness: Exactness
    answer_digest: str  # of the file and the theorem alone: the answers are the same on every machine


def theorem_of(artifact: Artifact) -> Theorem | None:
    """Prove an exact artifact from its file; None for a float one. Raises NotExact."""
    if artifact.form != "exact":
        return None
    steps = read_steps(onnx.load_model_from_string(artifact.model_bytes))
    answers = digest_of_json({"file": artifact.digest, "theorem": THEOREM_VERSION})
    return Theorem(steps, prove_exact(steps), answers)


def hold_against_integers(
    theorem: Theorem, run: Run, shapes: Sequence[Shape], real: Pixels, report: Report
) -> tuple[dict[Shape, str], int]:
    """Return the shapes whose kernels give other bits than the integers, with the reason, and the images compared."""
    images, wanted = _integers(theorem.steps, real, report)
    wrong = {}
    for shape in shapes:
        size = shape.batch_size
        parts = [run(fill(images[at : at + size], size), shape.threads) for at in range(0, len(images), size)]
        if not same_bits(np.concatenate(parts)[: len(images)], wanted):
            wrong[shape] = "its kernels do not sum products: other bits than the integers"
    return wrong, len(images)


def _integers(steps: Steps, real: Pixels, report: Report) -> tuple[Pixels, NDArray[np.float32]]:
    """Return images of every kind with their logits, as many as BUDGET_S allows."""
    images = probe_images(MOST, real.shape[1:], real)
    order = np.random.default_rng(0).permutation(len(images))  # so that few images are of every kind too
    started, parts, seen = time.perf_counter(), [], 0
    report("the integers themselves", 0.97)
    while seen < len(images) and (seen < FEWEST or time.perf_counter() - started < BUDGET_S):
        parts.append(reference_logits(steps, images[order[seen : seen + FEWEST]]))
        seen += FEWEST
    return images[order[:seen]], np.concatenate(parts)
