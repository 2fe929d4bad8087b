"""The two models that are served: seeded, worthless weights through our own export, with an image for each.

Speed and bits are the real ones; labels mean nothing. A folder that holds them already is used as it is.
"""

import io
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.exact_networks import MEAN, STD, smooth_images, warm
from service.artifact import MODEL_FILE
from service.manifest import Manifest, PixelStatistics
from service.preprocessing import Preprocessing
from training.architectures import build
from training.exact.convert import Material
from training.exact.options import ExactOptions
from training.export import export_network
from training.loop import Normalize

IMAGES = 64  # that statistics are warmed on, folds are checked with, and exact forms are calibrated on
PHOTO = (500, 375)  # width and height of a usual ImageNet photograph


@dataclass(frozen=True, slots=True)
class Network:
    """A network to serve, and how a client's image of it looks."""

    name: str
    architecture: str
    classes: int
    size: int
    resize_to: int | None

    @property
    def preprocessing(self) -> Preprocessing:
        """As usual for ImageNet where there is a crop, else as it comes."""
        return Preprocessing(
            mode="RGB",
            size=(self.size, self.size),
            resize="shorter_side" if self.resize_to else "exact",
            resize_to=self.resize_to,
            mean=MEAN,
            std=STD,
        )

    def image(self) -> bytes:
        """Return the file that every client sends: a PNG of the model's own size, or a JPEG photograph."""
        side = self.size if self.resize_to is None else max(PHOTO)
        picture = Image.fromarray(smooth_images(1, side, seed=1)[0])
        file = io.BytesIO()
        if self.resize_to is None:
            picture.save(file, "PNG")
        else:
            picture.crop((0, 0, *PHOTO)).save(file, "JPEG", quality=85)
        return file.getvalue()


SMALL = Network("small", "small_resnet", 10, 32, None)
RESNET18 = Network("resnet18", "resnet18", 1000, 224, 224)
NETWORKS = {one.name: one for one in (SMALL, RESNET18)}


def build_models(folder: Path) -> Path:
    """Write every network into its own repository below `folder` unless it is there; return `folder`."""
    for network in NETWORKS.values():
        if not model_file(folder, network).is_file():
            _export(network, repository(folder, network))
    return folder


def repository(folder: Path, network: Network) -> Path:
    """Return the model repository that holds this network alone."""
    return folder / network.name


def model_file(folder: Path, network: Network) -> Path:
    """Return the float ONNX file, which peers run too."""
    return repository(folder, network) / network.name / "1" / MODEL_FILE


def _export(network: Network, models: Path) -> None:
    torch.manual_seed(0)
    images = smooth_images(IMAGES, network.size)
    module = build(network.architecture, channels=3, classes=network.classes, size=network.size)
    standardised = Normalize(MEAN, STD)(torch.from_numpy(images).permute(0, 3, 1, 2)).float()
    with torch.no_grad():
        warm(module, standardised)
    scaled = images.reshape(-1, 3) / 255
    manifest = Manifest(
        name=network.name,
        labels=tuple(f"class {index}" for index in range(network.classes)),
        preprocessing=network.preprocessing,
        pixels=PixelStatistics(mean=tuple(np.mean(scaled, axis=0)), std=tuple(np.std(scaled, axis=0))),
        training=_origin(network.architecture),
    )
    exact = ExactOptions("require")
    export_network(module.eval(), manifest, images, models, exact=exact, material=Material(images))


def _origin(architecture: str) -> dict[str, Any]:
    return {
        "source": architecture,
        "source_sha256": "of no file",
        "producer": "benchmarks.serving.networks, seed 0",
        "images": "seeded smooth",
        "versions": {"torch": torch.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }
