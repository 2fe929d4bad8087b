"""Networks by name: ours, and any of timm's where timm is installed."""

from collections.abc import Callable
from importlib.util import find_spec

from torch import nn

from service.errors import nearest
from training.architectures.blocks import Normalization
from training.architectures.fast import FastCNN
from training.architectures.lenet import LeNetCReLU
from training.architectures.mobile import MobileNet
from training.architectures.resnet import resnet18, resnet50
from training.architectures.small import SmallCNN, SmallResNet
from training.errors import UsageError
from training.normalization.layers import batch_norms, taken_apart

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCNN,
    "small_resnet": SmallResNet,
    "fast_cnn": FastCNN,
    "lenet_crelu": LeNetCReLU,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenet": MobileNet,
}
TIMM = "timm:"


def build(
    name: str,
    *,
    channels: int,
    classes: int,
    size: int,
    norm: str = "batch",
    bn_momentum: float = 0.1,
    bn_eps: float = 1e-5,
    dropout: float = 0.0,
) -> nn.Module:
    """Build a network by name for square images of `size` pixels; `dropout` is the share dropped before the head.

    Raises UsageError: an unknown name with the nearest one, timm where it is missing, a norm that timm does not take.
    """
    check_name(name)
    after = Normalization(norm, bn_momentum, bn_eps)
    if name.startswith(TIMM):
        return _build_timm(name.removeprefix(TIMM), channels, classes, after, dropout)
    return ARCHITECTURES[name](channels, classes, size=size, norm=after, dropout=dropout)


def check_name(name: str) -> None:
    """Raise UsageError, with the nearest name, for a network that is not there."""
    if name.startswith(TIMM):
        _check_timm(name.removeprefix(TIMM))
    elif name not in ARCHITECTURES:
        there = ", ".join(ARCHITECTURES)
        raise UsageError(
            f"architecture {name} is not known{nearest(name, ARCHITECTURES)}; there are {there}, and {TIMM}NAME"
        )


def _check_timm(name: str) -> None:
    if find_spec("timm") is None:
        raise UsageError(f"architecture {TIMM}{name} needs timm: pip install timm")
    import timm  # noqa: PLC0415 - optional, and slow to import

    if name not in timm.list_models():
        raise UsageError(f"architecture {TIMM}{name} is not one of timm's{nearest(name, timm.list_models())}")


def _build_timm(name: str, channels: int, classes: int, norm: Normalization, dropout: float) -> nn.Module:
    import timm  # noqa: PLC0415 - the same

    if norm.kind != "batch":
        raise UsageError(f"norm = {norm.kind}: {TIMM}{name} keeps the normalization that timm gives it; use batch")
    network = taken_apart(
        timm.create_model(name, pretrained=False, in_chans=channels, num_classes=classes, drop_rate=dropout)
    )
    for _, layer in batch_norms(network):
        layer.momentum, layer.eps = norm.momentum, norm.eps
    return network
