"""ResNet-18 and -50 for 224 × 224 pixels as models of a repository: seeded weights, real arithmetic, real folding."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from service.artifact import GOLDEN_FILE, MANIFEST_KEY, MODEL_FILE
from service.golden import Golden
from service.independence.probe import Pixels
from service.manifest import Manifest
from service.preprocessing import Preprocessing, encode_png
from training.export import Classifier, to_onnx
from training.folding.modules import fold
from training.loop import Normalize
from training.parity import reference

SIDE = 224
CLASSES = 1000
GOLDEN_IMAGES = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class Block(nn.Module):
    """He et al. 2015, figure 5: two 3 × 3 convolutions, or with `expansion` 4 the bottleneck of 1 × 1, 3 × 3, 1 × 1."""

    def __init__(self, inputs: int, width: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        outputs = width * expansion
        kernels = [(inputs, width, 3), (width, width, 3)] if expansion == 1 else None
        kernels = kernels or [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
        strided = next(index for index, kernel in enumerate(kernels) if kernel[2] == 3)
        layers = [conv_norm(*kernel, stride if index == strided else 1) for index, kernel in enumerate(kernels)]
        self.body = nn.Sequential(*itertools.chain.from_iterable((layer, nn.ReLU()) for layer in layers))[:-1]
        is_plain = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if is_plain else conv_norm(inputs, outputs, 1, stride)

    def forward(self, features: Tensor) -> Tensor:
        """Return features (N, width · expansion, H/stride, W/stride)."""
        return functional.relu(self.body(features) + self.shortcut(features))


class ResNet(nn.Module):
    """He et al. 2015, table 1: a 7 × 7 stem, four stages of blocks, global average pooling, a linear head."""

    def __init__(self, depths: tuple[int, ...], expansion: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks: list[nn.Module] = []
        inputs = 64
        for stage, depth in enumerate(depths):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Block(inputs, 64 * 2**stage, stride=stride, expansion=expansion))
                inputs = 64 * 2**stage * expansion
        self.stages = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        logits: Tensor = self.head(self.pool(self.stages(self.stem(images))).flatten(1))
        return logits


RESNETS: dict[str, Callable[[], ResNet]] = {
    "resnet18": lambda: ResNet((2, 2, 2, 2), expansion=1),
    "resnet50": lambda: ResNet((3, 4, 6, 3), expansion=4),
}


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution without bias that keeps the size but for its stride, and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, momentum=None))  # statistics are plain means over all batches


def write_resnet(models: Path, name: str) -> Path:
    """Write a random network, folded, as models/<name>/1/; return `models`."""
    torch.manual_seed(0)
    images = _photos(GOLDEN_IMAGES)
    normalize, network = Normalize(MEAN, STD), RESNETS[name]()
    with torch.no_grad():
        for part in np.array_split(images, 4):
            network.train()(normalize(torch.from_numpy(part).permute(0, 3, 1, 2)).float())
    folded = fold(network.eval())
    wanted = reference(Classifier(normalize, folded.unfolded), images)
    model = to_onnx(Classifier(normalize, folded.module), example=images[:2])
    manifest = Manifest(
        name=name,
        labels=tuple(f"class {index}" for index in range(CLASSES)),
        preprocessing=Preprocessing(mode="RGB", size=(SIDE, SIDE), mean=MEAN, std=STD),
        folds=folded.folds,
    )
    model.metadata_props.add(key=MANIFEST_KEY, value=manifest.model_dump_json())
    golden = Golden(tuple(encode_png(image) for image in images), images, wanted.logits, wanted.limit)
    folder = models / name / "1"
    folder.mkdir(parents=True)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    (folder / GOLDEN_FILE).write_bytes(golden.to_bytes())
    return models


def _photos(count: int) -> Pixels:
    """Return smooth seeded images with some noise, uint8 (count, SIDE, SIDE, 3): nearer to photos than noise is."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((count, 3, 8, 8), generator=generator)
    smooth = functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")
    noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    pixels: Pixels = (255 * noisy.clamp(0, 1)).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return pixels
