"""The moves of a Network in PyTorch: values change place, or the largest of some is taken."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as fn
from onnx import helper
from torch import Tensor

from training.exact.network import Move

Attributes = Mapping[str, Any]
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: fn.conv1d, 4: fn.conv2d, 5: fn.conv3d}  # by the rank of images
POOLS: dict[int, Callable[..., Tensor]] = {3: fn.max_pool1d, 4: fn.max_pool2d, 5: fn.max_pool3d}


def move(layer: Move, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the outputs of a move for its inputs."""
    given = {one.name: helper.get_attribute_value(one) for one in layer.node.attribute}
    made = MOVES[layer.node.op_type](layer, given, inputs)
    return made if isinstance(made, tuple) else (made,)


def padded(x: Tensor, pads: tuple[int, ...], value: float = 0.0) -> Tensor:
    """Return images with ONNX's pads (starts, then ends) around their positions."""
    spatial = len(pads) // 2
    sides = [pads[axis + end * spatial] for axis in reversed(range(spatial)) for end in (0, 1)]
    return fn.pad(x, sides, value=value) if any(pads) else x


def _max_pool(_: Move, given: Attributes, inputs: list[Tensor]) -> Tensor:
    framed = padded(inputs[0], tuple(given["pads"]), float("-inf"))
    return POOLS[framed.ndim](framed, given["kernel_shape"], given["strides"], 0, given["dilations"])


def _split(layer: Move, given: Attributes, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    axis = given.get("axis", 0)
    sizes = layer.constants[1].tolist() if 1 in layer.constants else inputs[0].shape[axis] // len(layer.outputs)
    return tuple(torch.split(inputs[0], sizes, dim=axis))


def _reshape(layer: Move, _: Attributes, inputs: list[Tensor]) -> Tensor:
    wanted = enumerate(layer.constants[1].tolist())
    return inputs[0].reshape([inputs[0].shape[at] if side == 0 else side for at, side in wanted])


def _squeeze(layer: Move, _: Attributes, inputs: list[Tensor]) -> Tensor:
    x = inputs[0]
    for axis in sorted((one % x.ndim for one in layer.constants[1].tolist()), reverse=True):
        x = x.squeeze(axis)
    return x


def _unsqueeze(layer: Move, _: Attributes, inputs: list[Tensor]) -> Tensor:
    x = inputs[0]
    for axis in sorted(layer.constants[1].tolist()):
        x = x.unsqueeze(axis)
    return x


def _pad(layer: Move, _: Attributes, inputs: list[Tensor]) -> Tensor:
    x, pads = inputs[0], layer.constants[1].tolist()
    axes = layer.constants[3].tolist() if 3 in layer.constants else list(range(x.ndim))
    filler = float(layer.constants[2].reshape(())) if 2 in layer.constants else 0.0
    sides = [0] * 2 * x.ndim
    for place, axis in enumerate(axes):
        at = 2 * (x.ndim - 1 - axis % x.ndim)
        sides[at], sides[at + 1] = pads[place], pads[place + len(axes)]
    return fn.pad(x, sides, value=filler)


def _slice(layer: Move, _: Attributes, inputs: list[Tensor]) -> Tensor:
    x, starts, ends = inputs[0], layer.constants[1].tolist(), layer.constants[2].tolist()
    axes = layer.constants[3].tolist() if 3 in layer.constants else list(range(len(starts)))
    steps = layer.constants[4].tolist() if 4 in layer.constants else [1] * len(starts)
    cut = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cut[axis] = slice(start, min(end, x.shape[axis]), step)
    return x[tuple(cut)]


MOVES: dict[str, Callable[[Move, Attributes, list[Tensor]], Tensor | tuple[Tensor, ...]]] = {
    "Concat": lambda _, given, inputs: torch.cat(inputs, dim=given["axis"]),
    "Flatten": lambda _, given, inputs: inputs[0].flatten(given.get("axis", 1)),
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": lambda _, given, inputs: inputs[0].permute(given["perm"]),
    "Unsqueeze": _unsqueeze,
}
