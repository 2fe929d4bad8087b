"""The network of the MNIST experiment that made BatchNorm's case for many: LeNet's shape with CReLU."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.architectures.blocks import ConvNorm, LinearNorm, Normalization


class LeNetCReLU(nn.Module):
    """conv 16 5×5, pool, conv 32 5×5, pool, fc 1024, each normalized and followed by CReLU; dropout; a linear head.

    CReLU(x) = relu(x), relu(−x) side by side (Shang et al. 2016, arXiv 1603.05201) doubles the channels. Convolutions
    and pools keep the edges, as TensorFlow's SAME does: 28 → 14 → 7. With `norm` none the layers have biases instead.
    """

    def __init__(self, channels: int, classes: int, *, size: int, norm: Normalization, dropout: float) -> None:
        super().__init__()
        side = -(-size // 4)  # each pool rounds up, and so do both together
        self.block1 = ConvNorm(channels, 16, 5, padding=2, norm=norm)
        self.block2 = ConvNorm(2 * 16, 32, 5, padding=2, norm=norm)
        self.block3 = LinearNorm(2 * 32 * side * side, 1024, norm=norm)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * 1024, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        features = functional.max_pool2d(crelu(self.block1(images)), 2, ceil_mode=True)  # (N, 32, 14, 14)
        features = functional.max_pool2d(crelu(self.block2(features)), 2, ceil_mode=True)  # (N, 64, 7, 7)
        features = crelu(self.block3(features.flatten(1)))  # (N, 2048)
        logits: Tensor = self.head(self.dropout(features))
        return logits


def crelu(features: Tensor) -> Tensor:
    """Return (N, 2·C, …): the positive part, then the negative part turned positive."""
    return functional.relu(torch.cat([features, -features], dim=1))
