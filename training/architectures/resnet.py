"""ResNet-18 and ResNet-50 (He et al. 2016, arXiv 1512.03385, table 1), with the stem that an image's size asks for."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn import functional

from training.architectures.blocks import ConvNorm, Normalization
from training.architectures.small import ResidualBlock

LARGE_IMAGE = 65  # pixels; below, the ImageNet stem would leave nothing of an image (as in the paper's section 4.2)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 with four times the width at the end; the stride is in the 3×3, as in version 1.5."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, norm: Normalization) -> None:
        super().__init__()
        width = outputs // 4
        self.reduce = ConvNorm(inputs, width, 1, padding=0, norm=norm)
        self.middle = ConvNorm(width, width, 3, padding=1, stride=stride, norm=norm)
        self.expand = ConvNorm(width, outputs, 1, padding=0, norm=norm)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = ConvNorm(inputs, outputs, 1, padding=0, stride=stride, norm=norm)

    def forward(self, features: Tensor) -> Tensor:
        """Return features (N, outputs, height / stride, width / stride)."""
        inner = functional.relu(self.middle(functional.relu(self.reduce(features))))
        return functional.relu(self.expand(inner) + self.shortcut(features))


class ResNet(nn.Module):
    """A stem, four stages that halve the sides and double the channels, global pooling, a linear head."""

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        size: int,
        norm: Normalization,
        dropout: float,
        block: Callable[..., nn.Module],
        depths: tuple[int, int, int, int],
        widths: tuple[int, int, int, int],
    ) -> None:
        super().__init__()
        self.is_large = size >= LARGE_IMAGE
        kernel, padding, stride = (7, 3, 2) if self.is_large else (3, 1, 1)
        self.stem = ConvNorm(channels, 64, kernel, padding=padding, stride=stride, norm=norm)
        inputs = (64, *widths[:-1])
        stages = [
            nn.Sequential(*_blocks(block, before, width, depth, stride=1 if index == 0 else 2, norm=norm))
            for index, (before, width, depth) in enumerate(zip(inputs, widths, depths, strict=True))
        ]
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        features = functional.relu(self.stem(images))
        if self.is_large:
            features = functional.max_pool2d(features, 3, stride=2, padding=1)  # 224 → 112 → 56
        features = self.pool(self.stages(features))  # (N, widths[-1], 1, 1)
        logits: Tensor = self.head(self.dropout(features.flatten(1)))
        return logits


def resnet18(channels: int, classes: int, *, size: int, norm: Normalization, dropout: float) -> ResNet:
    """Build ResNet-18: two plain blocks a stage."""
    shape = {"block": ResidualBlock, "depths": (2, 2, 2, 2), "widths": (64, 128, 256, 512)}
    return ResNet(channels, classes, size=size, norm=norm, dropout=dropout, **shape)  # type: ignore[arg-type]


def resnet50(channels: int, classes: int, *, size: int, norm: Normalization, dropout: float) -> ResNet:
    """Build ResNet-50, version 1.5: bottlenecks."""
    shape = {"block": Bottleneck, "depths": (3, 4, 6, 3), "widths": (256, 512, 1024, 2048)}
    return ResNet(channels, classes, size=size, norm=norm, dropout=dropout, **shape)  # type: ignore[arg-type]


def _blocks(
    block: Callable[..., nn.Module], inputs: int, outputs: int, depth: int, *, stride: int, norm: Normalization
) -> Iterator[nn.Module]:
    yield block(inputs, outputs, stride=stride, norm=norm)
    for _ in range(depth - 1):
        yield block(outputs, outputs, stride=1, norm=norm)
