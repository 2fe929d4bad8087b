"""Small networks for images of 8 to 64 pixels: a plain one, made to be fast, and a residual one."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from training.architectures.blocks import ConvNorm, Normalization


class SmallCNN(nn.Module):
    """Four convolutions of 32 to 64 channels, each with normalization and ReLU, and a linear head.

    Images of 20 pixels and more lose their edges on the way (28 → 24 → 12 → 10 → 8 → 4), which saves a third of the
    work; smaller ones are padded. Narrower layers would gain nothing as int8: kernels work on blocks of 16 channels.
    """

    def __init__(self, channels: int, classes: int, *, size: int, norm: Normalization, dropout: float) -> None:
        super().__init__()
        is_small = size < 20
        conv = partial(ConvNorm, norm=norm)
        self.block1 = conv(channels, 32, 3 if is_small else 5, padding=1 if is_small else 0)
        self.block2 = conv(32, 48, 3, padding=1 if is_small else 0)
        self.block3 = conv(48, 64, 3, padding=1 if is_small else 0)
        self.block4 = conv(64, 64, 3, padding=1)
        side = size // 4 if is_small else ((size - 4) // 2 - 4) // 2
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(64 * side * side, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        features = functional.max_pool2d(functional.relu(self.block1(images)), 2)  # (N, 32, 12, 12) for 28 pixels
        features = functional.relu(self.block2(features))
        features = functional.max_pool2d(functional.relu(self.block3(features)), 2)  # (N, 64, 4, 4)
        features = functional.relu(self.block4(features))
        logits: Tensor = self.head(self.dropout(features.flatten(1)))
        return logits


class SmallResNet(nn.Module):
    """A residual network for images of 28 to 64 pixels: a stem, three stages of two blocks, global pooling."""

    def __init__(self, channels: int, classes: int, *, size: int, norm: Normalization, dropout: float) -> None:
        super().__init__()
        del size  # global pooling takes any
        block = partial(ResidualBlock, norm=norm)
        self.stem = ConvNorm(channels, 32, 3, padding=1, norm=norm)
        self.stage1 = nn.Sequential(block(32, 32, stride=1), block(32, 32, stride=1))
        self.stage2 = nn.Sequential(block(32, 64, stride=2), block(64, 64, stride=1))
        self.stage3 = nn.Sequential(block(64, 128, stride=2), block(128, 128, stride=1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        features = functional.max_pool2d(functional.relu(self.stem(images)), 2)  # (N, 32, size/2, size/2)
        features = self.stage3(self.stage2(self.stage1(features)))  # (N, 128, size/8, size/8)
        logits: Tensor = self.head(self.dropout(self.pool(features).flatten(1)))
        return logits


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))): He et al. 2016, arXiv 1512.03385, figure 2."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, norm: Normalization) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, 3, padding=1, stride=stride, norm=norm)
        self.second = ConvNorm(outputs, outputs, 3, padding=1, norm=norm)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = ConvNorm(inputs, outputs, 1, padding=0, stride=stride, norm=norm)

    def forward(self, features: Tensor) -> Tensor:
        """Return features (N, outputs, height / stride, width / stride)."""
        inner = self.second(functional.relu(self.first(features)))
        return functional.relu(inner + self.shortcut(features))
