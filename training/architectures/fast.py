"""A network made to learn small images in few epochs: the shape of airbench, without what the service cannot fold."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from training.architectures.blocks import ConvNorm, Normalization

WIDTHS = (32, 64, 128)


class FastCNN(nn.Module):
    """Three pairs of 3×3 convolutions of 32, 64 and 128 channels, each normalized, a pool after each, a linear head.

    Like airbench (Jordan 2024, arXiv 2404.00498) it is plain, padded, and without biases under the normalization.
    Unlike it it has ReLU, and normalizes before the pool: so it folds whatever the sign of γ, and every layer has an
    exact integer form. The head sees places (3×3 of 28 pixels), for garments and digits stand in the middle.
    """

    def __init__(self, channels: int, classes: int, *, size: int, norm: Normalization, dropout: float) -> None:
        super().__init__()
        conv = partial(ConvNorm, kernel=3, padding=1, norm=norm)
        inputs = (channels, *WIDTHS[:-1])
        self.firsts = nn.ModuleList(conv(before, width) for before, width in zip(inputs, WIDTHS, strict=True))
        self.seconds = nn.ModuleList(conv(width, width) for width in WIDTHS)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTHS[-1] * (size // 8) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        features = images
        for first, second in zip(self.firsts, self.seconds, strict=True):
            features = functional.relu(second(functional.relu(first(features))))
            features = functional.max_pool2d(features, 2)  # (N, 32, 14, 14), (N, 64, 7, 7), (N, 128, 3, 3)
        logits: Tensor = self.head(self.dropout(features.flatten(1)))
        return logits
