"""Random exact models from a short recipe: arbitrary factors, signed tensors, sums up to the very bound."""

from dataclasses import dataclass

import numpy as np
from exact_support import LIMIT, Graph, convolve, room_of, table_values, worst_sum


@dataclass(frozen=True)
class Recipe:
    """What a random exact model is made of; the same recipe makes the same model."""

    seed: int = 0
    channels: int = 3
    side: int = 7
    blocks: tuple[str, ...] = ("conv",)
    is_signed: bool = True
    at_the_brim: bool = True
    function: str = "silu"
    images: int = 5
    weight_zero: bool = True
    classes: int = 5


BLOCKS = (
    "conv",
    "strided",
    "dilated",
    "depthwise",
    "grouped",
    "residual",
    "excite",
    "concat",
    "max",
    "mean",
    "table",
    "clip",
    "pad",
)


class Maker:
    """Makes the model of a recipe: arbitrary factors, signed tensors, sums up to the very bound."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.random = np.random.default_rng(recipe.seed)
        shape = (recipe.images, recipe.side, recipe.side, recipe.channels)
        self.graph = Graph(self.random.integers(0, 256, shape, dtype=np.uint8))

    def make(self) -> Graph:
        x, zero = self.first()
        for block in self.recipe.blocks:
            x, zero = getattr(self, block)(x, zero)
        features = self.graph.values[x][0].size
        weight = self.random.integers(-127, 128, (features, self.recipe.classes)).astype(np.int8)
        weight //= 1 + 255 * 127 * features // LIMIT
        bias = self.bias(weight.T, zero)
        scale = self.random.uniform(1e-6, 1e-3)
        self.graph.head(x, weight, bias, scale, x_zero=zero, weight_zero=self.recipe.weight_zero)
        return self.graph

    def zero(self, *, even: bool = False) -> int:
        if not self.recipe.is_signed:
            return 0
        return int(self.random.integers(0, 128)) * 2 if even else int(self.random.integers(0, 256))

    def bias(self, weight: np.ndarray, x_zero: int) -> np.ndarray:
        """Return biases; at the brim every other channel's largest partial sum is 2^24 − 1."""
        bias = self.random.integers(-5000, 5000, len(weight))
        if self.recipe.at_the_brim:
            brim = (LIMIT - 1 - worst_sum(weight, x_zero)) * self.random.choice([-1, 1], len(weight))
            bias[::2] = brim[::2]
        return bias.astype(np.int32)

    def first(self) -> tuple[str, int]:
        x = self.graph.planes()
        if self.recipe.channels == 3:
            x = self.graph.framed_channels(x, [124, 116, 104])
            return self.convolution(x, 0, 8, 3, pad=0)
        return self.convolution(x, self.zero(), 8, 3, pad=1)

    def convolution(self, x: str, x_zero: int, filters: int, kernel: int, *, groups: int = 1, even=False, **options):
        inputs = self.graph.values[x].shape[1]
        weight = self.random.integers(-127, 128, (filters, inputs // groups, kernel, kernel)).astype(np.int8)
        bias = self.bias(weight, x_zero)
        step = self.spread(x, x_zero, weight, bias, groups, options)
        y_zero = self.zero(even=even)
        options = {"x_zero": x_zero, "y_zero": y_zero, "groups": groups, **options}
        return self.graph.conv(x, weight, bias, self.random.uniform(20, 120, filters) / step, **options), y_zero

    def spread(self, x, x_zero, weight, bias, groups, options) -> np.ndarray:
        """Return the size of each channel's sums, so that factors can bring them into a byte."""
        given = (options.get("stride", 1), options.get("pad", 0), options.get("dilation", 1), groups)
        sums = convolve(self.graph.values[x] - x_zero, weight.astype(np.int64), *given) + bias[:, None, None]
        return np.maximum(1, np.abs(sums).max(axis=(0, 2, 3)))

    def width(self, x: str) -> int:
        return self.graph.values[x].shape[1]

    def conv(self, x, zero):
        return self.convolution(x, zero, self.width(x), 3, pad=1)

    def strided(self, x, zero):
        return self.convolution(x, zero, self.width(x), 3, pad=1, stride=2)

    def dilated(self, x, zero):
        return self.convolution(x, zero, self.width(x), 3, pad=2, dilation=2)

    def depthwise(self, x, zero):
        return self.convolution(x, zero, self.width(x), 3, pad=1, groups=self.width(x))

    def grouped(self, x, zero):
        return self.convolution(x, zero, self.width(x), 3, pad=1, groups=2)

    def residual(self, x, _):
        a, a_zero = self.convolution(x, _, self.width(x), 1, even=True)
        b, b_zero = self.convolution(x, _, self.width(x), 3, pad=1, even=True)
        y_zero = self.zero(even=True)
        scales = tuple(float(2.0 ** self.random.integers(-3, 4)) for _ in range(3))
        return self.graph.pair("Add", a, b, scales, (a_zero, b_zero, y_zero)), y_zero

    def excite(self, x, zero):
        """Squeeze and excitation: the mean of a plane, a sigmoid, a product with the plane."""
        a, a_zero = self.convolution(x, zero, self.width(x), 1, even=True)
        mean, mean_zero = self.whole_mean(a, a_zero)
        gate, gate_zero = self.convolution(mean, mean_zero, self.width(x), 1)
        gate, gate_zero = self.look_up("sigmoid", gate, gate_zero, even=True)
        y_zero = self.zero(even=True)
        return self.graph.pair("Mul", a, gate, (1.0, 2.0**-8, 1.0), (a_zero, gate_zero, y_zero)), y_zero

    def whole_mean(self, x, zero):
        """A global mean is a depthwise sum, whose factor divides."""
        channels, side = self.width(x), self.graph.values[x].shape[-1]
        weight = np.ones((channels, 1, side, side))
        y = self.graph.conv(
            x, weight, np.zeros(channels), np.full(channels, 1 / side**2), x_zero=zero, y_zero=zero, groups=channels
        )
        return y, zero

    def concat(self, x, zero):
        half, half_zero = self.convolution(x, zero, 4, 3, pad=1)
        other, _ = self.convolution(x, zero, 4, 1)
        return self.graph.concat(half, other), half_zero

    def max(self, x, zero):
        return self.graph.max_pool(x, 3, 1, 1), zero

    def mean(self, x, zero):
        channels = self.width(x)
        factor = np.full(channels, 1 / 9)
        weight = np.ones((channels, 1, 3, 3))
        return self.graph.conv(
            x, weight, np.zeros(channels), factor, x_zero=zero, y_zero=zero, pad=1, groups=channels
        ), zero

    def table(self, x, zero):
        return self.look_up(self.recipe.function, x, zero)

    def look_up(self, function, x, zero, *, even=False):
        """Draw grids until no value lies near a tie, as an exporter has to."""
        y_zero = self.zero(even=even)
        while True:
            x_scale, y_scale = self.random.uniform(0.01, 0.1), self.random.uniform(0.004, 0.05)
            if room_of(table_values(function, x_scale, zero, y_scale)) > 1.1e-3:
                return self.graph.table(function, x, x_scale, zero, y_scale, y_zero), y_zero

    def clip(self, x, zero):
        return self.graph.clip(x, 3, 200), zero

    def pad(self, x, zero):
        return self.convolution(self.graph.pad(x, zero), zero, self.width(x), 3)


def make(recipe: Recipe) -> Graph:
    """Return the graph of a recipe, with its oracle's values."""
    return Maker(recipe).make()
