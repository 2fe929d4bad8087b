"""Networks with seeded, worthless weights, as folded float artifacts: what `exact` and `zoo_exact` convert.

Weights as they are drawn, and statistics warmed on the images; so speed and bits are the real ones, and labels hang
on near-ties. Knows nothing of the exact form.
"""

from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from benchmarks.zoo import Export, build, declare_missing_operators
from training.architectures import build as build_own
from training.export import Classifier, to_onnx
from training.folding.modules import fold
from training.loop import Normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
CLASSES = 1000
CHUNK = 16
COARSE = 8  # pixels between the corners of a smooth image
TRACED = 4  # images that a fold is checked with

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class FloatModel:
    """A folded float artifact without its manifest, and the images that its statistics were warmed on."""

    model: onnx.ModelProto
    images: Pixels


def smooth_images(count: int, size: int, seed: int = 0) -> Pixels:
    """Return seeded images (count, size, size, 3) that change slowly, as photographs do, with some noise on them."""
    generator = torch.Generator().manual_seed(seed)
    side = max(2, size // COARSE)
    coarse = torch.rand((count, 3, side, side), generator=generator)
    smooth = functional.interpolate(coarse, size=(size, size), mode="bicubic")
    noisy = smooth + 0.03 * torch.randn(smooth.shape, generator=generator)
    pixels: Pixels = (255 * noisy.clamp(0, 1)).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


def build_float(source: str, name: str, size: int, images: Pixels) -> FloatModel:
    """Return a network of `benchmarks.zoo`, or with the source `own` one of training.architectures, folded."""
    torch.manual_seed(0)
    if source == "own":
        network = build_own(name, channels=3, classes=CLASSES, size=size)
    else:
        declared = declare_missing_operators()
        network = build(Export(source, name, size))
        del declared
    return fold_warmed(network, images)


@torch.no_grad()
def fold_warmed(network: nn.Module, images: Pixels) -> FloatModel:
    """Return a network as an artifact, its statistics plain means over `images`, its BatchNorm folded."""
    normalize = Normalize(MEAN, STD)
    standardised = normalize(torch.from_numpy(images).permute(0, 3, 1, 2))
    warm(network.float(), standardised.float())
    folded: nn.Module = fold(network.eval(), standardised[:TRACED]).module
    return FloatModel(to_onnx(Classifier(normalize, folded), images[:2]), images)


def warm(network: nn.Module, standardised: torch.Tensor) -> None:
    norms = [one for one in network.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001 - no public base
    for norm in norms:
        norm.momentum = None  # a plain mean over all batches
        norm.reset_running_stats()
        if norm.weight is not None and not norm.weight.any():
            nn.init.ones_(norm.weight)  # timm begins with γ = 0 behind each block, which would be a dead layer
    network.eval()  # but for its norms: in training, Inception's second head would want larger images
    for norm in norms:
        norm.train()
    for part in standardised.split(CHUNK):
        network(part)


__all__ = ["FloatModel", "build_float", "fold_warmed", "smooth_images", "warm"]
