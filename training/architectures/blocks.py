"""What networks are made of: a convolution or linear layer with its normalization, whichever that is."""

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

CHANNELS_PER_GROUP = 8  # Wu & He 2018 (arXiv 1803.08494, table 3) find 8 to 16 alike; all widths here divide by 8


@dataclass(frozen=True, slots=True)
class Normalization:
    """What follows a layer. `momentum` is PyTorch's, 1 − TensorFlow's decay, and concerns `batch` alone."""

    kind: str = "batch"  # or layer, group, none
    momentum: float = 0.1
    eps: float = 1e-5

    def has_shift(self) -> bool:
        """True where the normalization adds a learned bias, so that the layer before it needs none."""
        return self.kind != "none"

    def for_images(self, channels: int) -> nn.Module:
        """Return it for features (N, channels, height, width).

        `layer` is one group over all channels and pixels of an image, `group` one over each CHANNELS_PER_GROUP.
        """
        if self.kind == "batch":
            return nn.BatchNorm2d(channels, momentum=self.momentum, eps=self.eps)
        return self._within_an_image(channels)

    def for_vectors(self, features: int) -> nn.Module:
        """Return it for features (N, features)."""
        if self.kind == "batch":
            return nn.BatchNorm1d(features, momentum=self.momentum, eps=self.eps)
        return self._within_an_image(features)

    def _within_an_image(self, channels: int) -> nn.Module:
        if self.kind == "none":
            return nn.Identity()
        groups = 1 if self.kind == "layer" else max(1, channels // CHANNELS_PER_GROUP)
        return nn.GroupNorm(groups, channels, eps=self.eps)


class ConvNorm(nn.Sequential):
    """Convolution, then normalization; the convolution has a bias only where the normalization brings none."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        norm: Normalization,
        padding: int,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        bias = not norm.has_shift()
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=padding, groups=groups, bias=bias)
        super().__init__(OrderedDict(conv=conv, norm=norm.for_images(outputs)))


class LinearNorm(nn.Sequential):
    """Linear layer, then normalization, for vectors (N, inputs) → (N, outputs)."""

    def __init__(self, inputs: int, outputs: int, *, norm: Normalization) -> None:
        linear = nn.Linear(inputs, outputs, bias=not norm.has_shift())
        super().__init__(OrderedDict(linear=linear, norm=norm.for_vectors(outputs)))
