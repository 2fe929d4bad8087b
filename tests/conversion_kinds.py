"""Small networks that hold, between them, every kind of layer that has an exact form, each with its hard variants."""

from collections.abc import Callable

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

Made = Callable[[], nn.Module]


class Wired(nn.Module):
    """Layers joined by a function: the wiring that nn.Sequential has no words for."""

    def __init__(self, wiring: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.wiring, self.layers = wiring, nn.ModuleList(layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.wiring(features, *self.layers)


def conv(inputs: int, outputs: int, kernel: int = 3, **given) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **({"padding": kernel // 2} | given))


def norm(channels: int) -> nn.BatchNorm2d:
    """Return a BatchNorm with a past: γ of both signs."""
    made = nn.BatchNorm2d(channels)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made


def classifier(*layers: nn.Module, channels: int = 8) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def squeeze(gate: Callable[[Tensor], Tensor]) -> nn.Module:
    def wiring(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
        return x * gate(up(torch.relu(down(fn.adaptive_avg_pool2d(x, 1)))))

    return Wired(wiring, conv(8, 4, 1), conv(4, 8, 1))


def residual(stride: int = 1) -> nn.Module:
    def wiring(x: Tensor, first: nn.Module, second: nn.Module, shortcut: nn.Module) -> Tensor:
        return torch.relu(shortcut(x) + second(torch.relu(first(x))))

    shortcut = conv(8, 8, 1, stride=stride) if stride > 1 else nn.Identity()
    return Wired(wiring, conv(8, 8, stride=stride), conv(8, 8), shortcut)


def preactivated(x: Tensor, before: nn.Module, layer: nn.Module) -> Tensor:
    return x + layer(torch.relu(before(x)))


def inverted(x: Tensor, widen: nn.Module, depthwise: nn.Module, gate: nn.Module, narrow: nn.Module) -> Tensor:
    return x + narrow(gate(fn.silu(depthwise(fn.silu(widen(x))))))


def branches(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    return torch.cat([x[:, :4], torch.relu(first(x)), second(x)], 1)


KINDS: dict[str, tuple[int, Made]] = {
    "one channel, padded, LeakyReLU, max pooling of signed values": (
        1,
        lambda: classifier(
            conv(1, 8), nn.LeakyReLU(0.1), conv(8, 8), nn.MaxPool2d(3, 2, 1), conv(8, 8), nn.LeakyReLU(0.2)
        ),
    ),
    "one channel, not padded, Linear inside and as head, no biases": (
        1,
        lambda: nn.Sequential(
            conv(1, 4, padding=0, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(400, 20),
            nn.ReLU(),
            nn.Linear(20, 5, bias=False),
        ),
    ),
    "three channels, not padded, groups, depthwise, ReLU6": (
        3,
        lambda: classifier(
            conv(3, 8, padding=0), nn.ReLU6(), conv(8, 8, groups=4), nn.ReLU6(), conv(8, 8, groups=8), nn.ReLU6()
        ),
    ),
    "three channels, padded asymmetrically, strides, dilation, average pooling": (
        3,
        lambda: classifier(
            nn.ZeroPad2d((1, 2, 0, 1)),
            conv(3, 8, padding=0, stride=2),
            nn.ReLU(),
            conv(8, 8, dilation=2, padding=(2, 1)),
            nn.ReLU(),
            nn.AvgPool2d(3, 1, 1),
            conv(8, 8),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ),
    ),
    "a depthwise first layer, pads of a value inside, Hardtanh, same-padding of an even kernel": (
        3,
        lambda: classifier(
            conv(3, 6, groups=3),
            nn.Hardtanh(-1, 1),
            nn.ConstantPad2d((0, 1, 2, 0), 0.5),
            nn.Conv2d(6, 8, 4, padding="same"),
            nn.ReLU(),
        ),
    ),
    "max pooling of pixels, ceil_mode, global max pooling": (
        3,
        lambda: nn.Sequential(
            nn.MaxPool2d(2),
            conv(3, 8),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            conv(8, 8),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        ),
    ),
    "pixels into linear layers": (
        3,
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 20), nn.ReLU(), nn.Linear(20, 5)),
    ),
    "residual blocks, with and without a projection": (
        3,
        lambda: classifier(conv(3, 8), nn.ReLU(), residual(), residual(stride=2), residual()),
    ),
    "unfoldable BatchNorms: before the pixels' padded convolution, in residual branches, in front of the pool": (
        3,
        lambda: classifier(norm(3), conv(3, 8), Wired(preactivated, norm(8), conv(8, 8)), norm(8), nn.ReLU()),
    ),
    "branches of slices joined by Concat, shuffled channels": (
        3,
        lambda: classifier(
            conv(3, 8),
            nn.ReLU(),
            Wired(branches, conv(8, 4), conv(8, 4, 1)),
            nn.ChannelShuffle(2),
            conv(12, 8, groups=2),
            nn.ReLU(),
        ),
    ),
    "squeeze-and-excitation with sigmoid, SiLU, an inverted residual": (
        3,
        lambda: classifier(
            conv(3, 8),
            nn.SiLU(),
            Wired(inverted, conv(8, 8, 1), conv(8, 8, groups=8), squeeze(torch.sigmoid), conv(8, 8, 1)),
            nn.SiLU(),
        ),
    ),
    "squeeze-and-excitation with HardSigmoid, HardSwish": (
        3,
        lambda: classifier(conv(3, 8), nn.Hardswish(), squeeze(fn.hardsigmoid), conv(8, 8, 1), nn.Hardswish()),
    ),
    "GELU in both forms, sigmoid, tanh": (
        3,
        lambda: classifier(
            conv(3, 8), nn.GELU(), conv(8, 8), nn.GELU("tanh"), conv(8, 8), nn.Sigmoid(), conv(8, 8), nn.Tanh()
        ),
    ),
}
