"""One BatchNorm layer as a file holds it, whatever the file; no judgement here."""

from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from training.doctor.checkpoints import Checkpoint

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The numbers of one BatchNorm, each (K,) or None where the file has none; `momentum` is PyTorch's, 1 − decay.

    `initial_share` is what is left of the initial statistics, where the file itself records it.
    """

    name: str
    running_mean: Array | None = None
    running_var: Array | None = None
    weight: Array | None = None
    bias: Array | None = None
    eps: float = 1e-5
    momentum: float | None = None
    num_batches_tracked: int | None = None
    initial_share: float | None = None
    stored_as: str = "float32"
    frozen: bool = False  # γ or β is marked as not trained
    nested: bool = False  # in a branch or a loop of a graph, where its numbers alone are looked at

    @property
    def scale(self) -> Array | None:
        """|γ|/√(σ² + eps), (K,), where the variance allows it."""
        if self.running_var is None or not (self.running_var + self.eps > 0).all():
            return None
        scale = 1 / np.sqrt(self.running_var + self.eps)
        return scale if self.weight is None else np.abs(self.weight) * scale


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What is examined: the layers of a file, its other weights that are not finite, and its graph where it has one."""

    path: str
    kind: str
    layers: tuple[Layer, ...]
    counts_batches: bool = False  # a format that keeps num_batches_tracked
    missing: tuple[str, ...] = ()  # layers that lack their statistics
    damaged: tuple[str, ...] = ()  # weights with NaN or Inf
    folded: int = 0  # layers that the manifest says are folded away
    model: onnx.ModelProto | None = field(default=None, repr=False)
    checkpoint: Checkpoint | None = field(default=None, repr=False)
    network: nn.Module | None = field(default=None, repr=False)  # of a checkpoint; then `model` is made from it
