"""Does the artifact compute what the trained model computes? ONNX Runtime against the unfolded network in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from service.manifest import Parity
from training.errors import ExportRefused

BATCH_SIZES = (1, 2, 7, 64)
FEWEST_IMAGES, ENOUGH_IMAGES = 8, 1000
# Rounding in another order costs about as much as rounding does, so twice the noise is usual at the worst image, and
# 8 times leaves room for a small sample; a wrong fold or a wrong axis is off by thousands.
ROOM = 8
CHUNK = 250


@dataclass(frozen=True, slots=True)
class Reference:
    """The unfolded network on real images: float64 logits (N, K), and how far its own float32 is from them."""

    logits: NDArray[np.float64]
    float32_noise: float

    @property
    def limit(self) -> float:
        """The largest difference that rounding explains; at least one float32 step of the largest logit."""
        return max(ROOM * self.float32_noise, float(np.finfo(np.float32).eps) * float(np.abs(self.logits).max()))


@torch.no_grad()
def reference(unfolded: nn.Module, images: NDArray[np.uint8]) -> Reference:
    """Run the unfolded classifier, which takes uint8 (N, height, width, channels), in float64 and in float32."""
    logits = _run(unfolded.double(), images)
    noise = np.abs(_run(unfolded.float(), images) - logits).max()
    unfolded.double()
    return Reference(logits, float(noise))


def check(
    run: Callable[[NDArray[np.uint8]], NDArray[np.float32]], images: NDArray[np.uint8], wanted: Reference
) -> Parity:
    """Run the artifact at each of BATCH_SIZES over all images and hold it against the reference.

    Raises ExportRefused when a logit is off by more than rounding explains. A label that flips within that was a tie of
    two classes closer than twice the limit; flips are counted. Images are repeated where they do not fill a batch.
    """
    worst, flips = 0.0, 0
    for batch_size in BATCH_SIZES:
        filled = images[np.arange(batch_size) % len(images)] if len(images) < batch_size else images
        batches = [run(filled[start : start + batch_size]) for start in range(0, len(filled), batch_size)]
        logits = np.concatenate(batches)[: len(images)].astype(np.float64)
        if not np.isfinite(logits).all():
            raise ExportRefused(f"at batch {batch_size} a logit is not finite; nothing was written")
        worst = max(worst, float(np.abs(logits - wanted.logits).max()))
        flips = max(flips, int((logits.argmax(1) != wanted.logits.argmax(1)).sum()))
        if not worst <= wanted.limit:
            raise ExportRefused(
                f"at batch {batch_size} a logit is {worst:.3g} off the unfolded model in float64, where rounding "
                f"explains {wanted.limit:.3g}; nothing was written. Please report this with the run folder"
            )
    return Parity(
        images=len(images),
        batch_sizes=BATCH_SIZES,
        max_abs_difference=worst,
        float32_noise=wanted.float32_noise,
        argmax_flips=flips,
    )


def _run(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    chunks = (torch.from_numpy(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK))
    return np.concatenate([model(chunk).double().numpy() for chunk in chunks])
