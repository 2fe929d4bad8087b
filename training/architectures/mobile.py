"""A depthwise network in MobileNet's manner, for images of 8 pixels and more."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

from training.architectures.blocks import ConvNorm, Normalization

HALVED, HALVED_TWICE = 20, 65  # pixels from which the stem, and then the first pair too, have pixels to give away
PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))  # outputs and stride of each


class DepthwisePair(nn.Module):
    """A 3×3 convolution of each channel alone, then a 1×1 over channels, each normalized and with ReLU.

    Howard et al. 2017 (arXiv 1704.04861, figure 3): an eighth of the work of a full 3×3 convolution.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, norm: Normalization) -> None:
        super().__init__()
        self.depthwise = ConvNorm(inputs, inputs, 3, padding=1, stride=stride, groups=inputs, norm=norm)
        self.pointwise = ConvNorm(inputs, outputs, 1, padding=0, norm=norm)

    def forward(self, features: Tensor) -> Tensor:
        """Return features (N, outputs, height / stride, width / stride)."""
        return functional.relu(self.pointwise(functional.relu(self.depthwise(features))))


class MobileNet(nn.Module):
    """A stem, seven depthwise pairs, global pooling, a linear head.

    The stem halves images of 20 pixels and more, and one pair more of them halves images of 65 and more.
    """

    def __init__(self, channels: int, classes: int, *, size: int, norm: Normalization, dropout: float) -> None:
        super().__init__()
        self.stem = ConvNorm(channels, 32, 3, padding=1, stride=2 if size >= HALVED else 1, norm=norm)
        pairs: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = 32
        for index, (outputs, stride) in enumerate(PAIRS):
            wanted = 2 if index == 0 and size >= HALVED_TWICE else stride
            pairs[f"pair{index + 1}"] = DepthwisePair(inputs, outputs, stride=wanted, norm=norm)
            inputs = outputs
        self.pairs = nn.Sequential(pairs)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        features = self.pool(self.pairs(functional.relu(self.stem(images))))  # (N, 512, 1, 1)
        logits: Tensor = self.head(self.dropout(features.flatten(1)))
        return logits
