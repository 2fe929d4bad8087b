"""Which of PyTorch's modules and functions let a scale and shift through, and by which rule."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from training.folding.passages import Passing, Rectifier, Reduction, Regrouping, Shape, Transposition, Unchanged, Window

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
ADAPTIVE_MAX_POOLS = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
POOLS = (*MAX_POOLS, *ADAPTIVE_MAX_POOLS, *ADAPTIVE_POOLS, *AVERAGE_POOLS)
REGROUPINGS = (torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, "flatten", "reshape", "view", "squeeze")

RuleOfCall = Callable[[fx.Node, Shape | None, Shape | None], Passing | None]  # the node, its input's shape, its own


def rule_of_module(module: Any, source: Shape | None, target: Shape | None) -> Passing | None:
    """Return how a module lets a change through, from the shapes before and after it; None where it does not."""
    rule: Passing | None = None
    if isinstance(module, (nn.Identity, *DROPOUTS)):
        rule = Unchanged()
    elif isinstance(module, nn.ReLU | nn.LeakyReLU):
        rule = Rectifier()
    elif isinstance(module, nn.Flatten | nn.Unflatten):
        rule = Regrouping(source, target)
    elif isinstance(module, (*MAX_POOLS, *ADAPTIVE_MAX_POOLS)):
        rule = None if module.return_indices else _window(_dims(module), source, largest=True)
    elif isinstance(module, ADAPTIVE_POOLS):
        rule = _window(_dims(module), source)
    elif isinstance(module, AVERAGE_POOLS):
        divisor = getattr(module, "divisor_override", None)
        rule = _average(_dims(module), source, module.padding, divisor, counts_zeros=module.count_include_pad)
    return rule


def rule_of_call(node: fx.Node, source: Shape | None, target: Shape | None) -> Passing | None:
    """Return the same for a function or method of one input."""
    found: RuleOfCall | None = CALLS.get(node.target)
    return None if found is None else found(node, source, target)


def _dims(module: Any) -> int:
    """Return over how many axes a pool goes, by torch's own class: a derived one may be called anything."""
    kind = next(one for one in type(module).__mro__ if one in POOLS)
    return int(kind.__name__[-2])


def _average(
    dims: int, source: Shape | None, padding: Any, divisor: int | None, *, counts_zeros: bool
) -> Passing | None:
    """Averages add up to 1 unless they count padding, or divide by a number of their own."""
    is_padded = any(padding) if isinstance(padding, tuple | list) else bool(padding)
    return _window(dims, source, counts_zeros=(is_padded and counts_zeros) or divisor is not None)


def _window(dims: int, source: Shape | None, *, largest: bool = False, counts_zeros: bool = False) -> Passing | None:
    """Pools take images without a batch axis too, where axis 1 is pooled: the rank must be seen, or be told apart."""
    return None if source is not None and len(source) != dims + 2 else Window(largest, counts_zeros)


def _given(node: fx.Node, index: int, name: str, default: Any) -> Any:
    """Return an argument, given by position or by keyword."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _dropout(node: fx.Node, _source: Shape | None, _target: Shape | None) -> Passing | None:
    """A call drops unless it is told not to, in evaluation mode too."""
    return None if _given(node, 2, "training", default=True) else Unchanged()


def _largest(dims: int) -> RuleOfCall:
    return lambda _node, source, _target: _window(dims, source, largest=True)


def _adaptive(dims: int) -> RuleOfCall:
    return lambda _node, source, _target: _window(dims, source)


def _averaged(dims: int) -> RuleOfCall:
    def rule(node: fx.Node, source: Shape | None, _target: Shape | None) -> Passing | None:
        padding, divisor = _given(node, 3, "padding", 0), _given(node, 6, "divisor_override", None)
        return _average(dims, source, padding, divisor, counts_zeros=_given(node, 5, "count_include_pad", default=True))

    return rule


def _mean(node: fx.Node, shape: Shape | None, _target: Shape | None) -> Passing | None:
    given, keepdims = _given(node, 1, "dim", None), _given(node, 2, "keepdim", default=False)
    axes = (given,) if isinstance(given, int) else given
    if shape is None or not isinstance(axes, tuple | list):
        return None
    return Reduction(
        node.target in {torch.amax, "amax"}, tuple(axis % len(shape) for axis in axes), len(shape), keepdims
    )


def _permuted(node: fx.Node, shape: Shape | None, _target: Shape | None) -> Passing | None:
    order: Any = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    if shape is None or len(order) != len(shape) or not all(isinstance(axis, int) for axis in order):
        return None
    return Transposition(tuple(axis % len(shape) for axis in order))


CALLS: dict[Any, RuleOfCall] = {
    **dict.fromkeys((functional.relu, torch.relu, "relu", functional.leaky_relu), lambda *_: Rectifier()),
    **dict.fromkeys(REGROUPINGS, lambda _node, source, target: Regrouping(source, target)),
    **dict.fromkeys((functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d), _dropout),
    **dict.fromkeys((torch.mean, "mean", torch.amax, "amax"), _mean),
    **dict.fromkeys((torch.permute, "permute"), _permuted),
    **{getattr(functional, f"max_pool{dims}d"): _largest(dims) for dims in (1, 2, 3)},
    **{getattr(functional, f"adaptive_max_pool{dims}d"): _largest(dims) for dims in (1, 2, 3)},
    **{getattr(functional, f"adaptive_avg_pool{dims}d"): _adaptive(dims) for dims in (1, 2, 3)},
    **{getattr(functional, f"avg_pool{dims}d"): _averaged(dims) for dims in (1, 2, 3)},
    torch.max_pool1d: _largest(1),
    torch.max_pool2d: _largest(2),
    torch.max_pool3d: _largest(3),
}  # fmt: skip
