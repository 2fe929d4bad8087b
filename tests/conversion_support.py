"""What tests of the conversion share: artifacts of small networks, images like photographs, checks of equality."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from service.engine import choose_device, open_engine
from service.executions import EXECUTIONS, execute_as
from service.independence.exactness import prove_exact, reference_logits
from service.integers import read_steps
from training.exact.calibration import calibrate
from training.exact.equalizing import equalize
from training.exact.grids import choose_grids
from training.exact.network import Network
from training.exact.settling import settle_tables
from training.exact.writing import write_exact
from training.export import Classifier, to_onnx
from training.loop import Normalize

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]
SIDE = 12
MEANS = {1: (0.13,), 3: (0.485, 0.456, 0.406)}
DEVIATIONS = {1: (0.31,), 3: (0.229, 0.224, 0.225)}


def artifact_of(
    network: nn.Module, channels: int = 3, side: int = SIDE, mean: Sequence[float] | None = None
) -> onnx.ModelProto:
    """Export a network that has no BatchNorm left the way the project does."""
    normalize = Normalize(mean or MEANS[channels], DEVIATIONS[channels])
    return to_onnx(Classifier(normalize, network.eval()), np.zeros((2, side, side, channels), np.uint8))


def random_images(count: int, channels: int = 3, side: int = SIDE, seed: int = 0) -> Pixels:
    """Return uniformly random pixels: the hardest inputs, near no photograph."""
    shape = (count, side, side, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth_images(count: int, channels: int = 3, side: int = SIDE, seed: int = 0) -> Pixels:
    """Return images with what photographs have: neighbours alike, dark and bright ones, flat areas at 0 and 255."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(count, channels, 4, 4)).astype(np.float32)
    fine = nn.functional.interpolate(torch.from_numpy(coarse), (side, side), mode="bilinear").numpy()
    level, contrast = rng.uniform(60, 190, (count, 1, 1, 1)), rng.uniform(20, 110, (count, 1, 1, 1))
    return np.clip(np.rint(level + contrast * fine), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1).copy()


@dataclass(frozen=True)
class Made:
    """A network, and the exact model that was made of it without fine-tuning; grids and samples too."""

    network: Network
    model: onnx.ModelProto
    bits: dict[str, int]
    grids: Any
    observed: Any


def exact_of(network: Network, images: Pixels, *, evened: bool = False) -> Made:
    """Take the steps of a conversion that choose no alternative."""
    observed = calibrate(network, images)
    if evened:
        network, _ = equalize(network, observed)
        observed = calibrate(network, images)
    grids = settle_tables(network, choose_grids(network, observed))
    model, bits = write_exact(network, grids, observed)
    return Made(network, model, bits, grids, observed)


def logits_of(model: onnx.ModelProto, images: Pixels, batch: int = 64) -> Logits:
    """Run a model in ONNX Runtime, `batch` images at a time."""
    engine = open_engine(model.SerializeToString(), choose_device("cpu"))
    return np.concatenate([engine.run(images[at : at + batch]) for at in range(0, len(images), batch)])


def assert_same_integers(model: onnx.ModelProto, images: Pixels, batches: Sequence[int] = (1, 7)) -> None:
    """Hold all executions against the NumPy reference, bit for bit, and check the proof."""
    onnx.checker.check_model(model, full_check=True)
    steps = read_steps(model)
    prove_exact(steps)
    wanted = reference_logits(steps, images).view(np.uint32)
    for execution in EXECUTIONS:
        derived = execute_as(model, execution)
        for batch in batches:
            found = logits_of(derived, images, batch).view(np.uint32)
            assert np.array_equal(found, wanted), f"{execution} at batch {batch}: {(found != wanted).sum()} logits"


def near(found: Logits, wanted: Logits) -> float:
    """Return the root mean squared difference over the standard deviation of the wanted logits."""
    return float(np.sqrt(((found - wanted) ** 2).mean()) / wanted.std())
