"""The logits of an exact model as integers give them, in NumPy's float64: sums there are exact up to 2⁵³.

Slow beside a runtime, and independent of every one: this is what kernels are held against.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from service.independence.exactness.moves import Bytes, move
from service.integers import Convolution, Head, Move, Pair, Steps, Table
from service.integers.steps import BYTE

Sums = NDArray[np.float64]


def reference_logits(steps: Steps, images: Bytes, *, chunk: int = 64) -> NDArray[np.float32]:
    """Return logits (N, K), float32, for images uint8 (N, height, width, channels), `chunk` of them at a time."""
    parts = [_run(steps, images[start : start + chunk]) for start in range(0, len(images), chunk)]
    return np.concatenate(parts)


def _run(steps: Steps, images: Bytes) -> NDArray[np.float32]:
    tensors: dict[str, Bytes] = {steps.image: images}
    last_use = {name: index for index, step in enumerate(steps.steps) for name in _inputs(step)}
    for index, step in enumerate(steps.steps):
        if isinstance(step, Head):
            return _head(step, tensors[step.x])
        tensors.update(_take(step, tensors))
        for name in _inputs(step):
            if last_use[name] == index:
                tensors.pop(name, None)
    raise AssertionError("read_steps ends with a Head")


def _inputs(step: object) -> tuple[str, ...]:
    if isinstance(step, Move):
        return step.inputs
    if isinstance(step, Pair):
        return step.a.tensor, step.b.tensor
    assert isinstance(step, Convolution | Table | Head)
    return (step.x,)


def _take(step: object, tensors: Mapping[str, Bytes]) -> dict[str, Bytes]:
    if isinstance(step, Move):
        return dict(zip(step.outputs, move(step, [tensors[name] for name in step.inputs]), strict=True))
    if isinstance(step, Pair):
        return {step.y.tensor: _pair(step, tensors[step.a.tensor], tensors[step.b.tensor])}
    if isinstance(step, Table):
        return {step.y: step.entries[tensors[step.x]]}
    assert isinstance(step, Convolution)
    return {step.y: _convolution(step, tensors[step.x])}


def _head(step: Head, x: Bytes) -> NDArray[np.float32]:
    sums = (x.astype(np.float64) - step.x_zero) @ step.weight.astype(np.float64) + step.bias
    logits: NDArray[np.float32] = sums.astype(np.float32) * step.scale
    return logits


def _pair(step: Pair, a: Bytes, b: Bytes) -> Bytes:
    left = (a.astype(np.float64) - step.a.zero) * step.a.scale
    right = (b.astype(np.float64) - step.b.zero) * step.b.scale
    value: Sums = (left + right if step.operation == "Add" else left * right) / step.y.scale
    return _to_bytes(value, step.y.zero)


def _convolution(step: Convolution, x: Bytes) -> Bytes:
    spatial = x.ndim - 2
    centred = x.astype(np.float64) - step.x_zero
    edges = [(0, 0), (0, 0), *zip(step.pads[:spatial], step.pads[spatial:], strict=True)]
    sums = _sums(step, np.pad(centred, edges)) + step.bias.reshape(-1, *[1] * spatial)
    factor = step.factor.reshape(-1, *[1] * spatial)
    return _to_bytes(sums.astype(np.float32) * factor, step.y_zero)  # the one rounding, in float32


def _sums(step: Convolution, x: Sums) -> Sums:
    """Return Σ x·weight for x (N, C, *space), padded: a matrix product, or shifts where each channel has its own."""
    weight = step.weight.astype(np.float64)
    if step.groups == x.shape[1] == len(weight):
        return _depthwise(step, weight[:, 0], x)
    windows = _windows(x, step)  # (N, C, *out, *kernel)
    spatial, out = x.ndim - 2, windows.shape[2 : x.ndim]
    order = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
    per_group = x.shape[1] // step.groups * int(np.prod(step.weight.shape[2:]))
    rows = windows.transpose(order).reshape(-1, step.groups, per_group)  # (N·out, groups, C/groups·kernel)
    filters = weight.reshape(step.groups, -1, per_group)
    sums = np.concatenate([rows[:, group] @ filters[group].T for group in range(step.groups)], axis=1)
    return np.moveaxis(sums.reshape(len(x), *out, -1), -1, 1)


def _windows(x: Sums, step: Convolution) -> Sums:
    kernel = step.weight.shape[2:]
    reach = tuple(dilation * (side - 1) + 1 for side, dilation in zip(kernel, step.dilations, strict=True))
    axes = tuple(range(2, x.ndim))
    windows = sliding_window_view(x, reach, axis=axes)
    strides = tuple(slice(None, None, stride) for stride in step.strides)
    dilations = tuple(slice(None, None, dilation) for dilation in step.dilations)
    return windows[(slice(None), slice(None), *strides, *dilations)]


def _depthwise(step: Convolution, weight: Sums, x: Sums) -> Sums:
    """Return the sums of one filter for each channel; weight (C, *kernel)."""
    windows, spatial = _windows(x, step), x.ndim - 2
    sums = np.zeros(windows.shape[: x.ndim])
    for place in product(*(range(side) for side in weight.shape[1:])):
        here: Any = (..., *place)
        sums += windows[here] * weight[here].reshape(-1, *[1] * spatial)
    return sums


def _to_bytes(value: NDArray[np.floating[Any]], zero: int) -> Bytes:
    rounded: Bytes = np.clip(np.rint(value) + zero, 0, BYTE).astype(np.uint8)
    return rounded
