"""Runs an ONNX graph in float64, as a measure for what float32 gives: onnx's reference evaluator, with fast products.

The reference evaluator is written for clarity and loops over pixels; convolutions and pooling go through PyTorch here.
"""

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor
from torch.nn import functional

from training.errors import FileRefused
from training.foreign.precision import with_floats
from training.foreign.read import inputs_of

CHUNK = 8


class Float64:
    """The model in float64; `run` takes what the model takes, in batches of any size."""

    def __init__(self, model: onnx.ModelProto) -> None:
        wide = with_floats(model, TensorProto.DOUBLE)
        self._input = inputs_of(wide.graph)[0].name
        self._output = wide.graph.output[0].name
        self._evaluator = ReferenceEvaluator(wide, new_ops=[Conv, BatchNormalization, MaxPool])

    def run(self, images: NDArray[Any]) -> NDArray[np.float64]:
        """Return the first output (N, K) in float64. Raises FileRefused for an operator that cannot be run so."""
        parts = [self._run(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
        return np.concatenate(parts).astype(np.float64)

    def _run(self, images: NDArray[Any]) -> NDArray[Any]:
        floats = images if images.dtype == np.uint8 else images.astype(np.float64)
        try:
            outputs: Any = self._evaluator.run([self._output], {self._input: floats})
        except Exception as error:  # the evaluator raises whatever NumPy does
            raise FileRefused(f"the graph cannot be run in float64: {type(error).__name__}: {error}") from error
        return np.asarray(outputs[0])


class Conv(OpRun):
    """Conv by PyTorch; padding of any form becomes zeros around the input."""

    op_domain = ""

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[NDArray[Any], ...]:
        images, weight, *rest = inputs
        window = _Window(attributes, images.shape[2:], weight.shape[2:])
        bias = _tensor(rest[0]) if rest and rest[0] is not None else None
        padded = functional.pad(_tensor(images), window.padding())
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[images.ndim - 3]
        groups = attributes.get("group") or 1
        return (convolve(padded, _tensor(weight), bias, window.strides, 0, window.dilations, groups).numpy(),)


class MaxPool(OpRun):
    """MaxPool by PyTorch, without indices; what lies outside is −∞."""

    op_domain = ""

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[NDArray[Any], ...]:
        (images,) = inputs
        window = _Window(attributes, images.shape[2:], tuple(attributes["kernel_shape"]))
        padded = functional.pad(_tensor(images), window.padding(), value=-torch.inf)
        pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[images.ndim - 3]
        ceil_mode = bool(attributes.get("ceil_mode"))
        return (pool(padded, window.kernel, window.strides, 0, window.dilations, ceil_mode=ceil_mode).numpy(),)


class BatchNormalization(OpRun):
    """BatchNormalization at inference, every version; training mode is refused before."""

    op_domain = ""

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[NDArray[Any], ...]:
        images, weight, bias, mean, var = inputs
        eps = attributes.get("epsilon")
        scale = weight / np.sqrt(var + (1e-5 if eps is None else eps))
        shape = (1, -1, *[1] * (images.ndim - 2))
        return ((images - mean.reshape(shape)) * scale.reshape(shape) + bias.reshape(shape),)


class _Window:
    """The attributes that Conv and MaxPool share (ONNX operators, Conv-11 and MaxPool-12)."""

    def __init__(self, attributes: dict[str, Any], size: tuple[int, ...], kernel: tuple[int, ...]) -> None:
        self.kernel = kernel
        self.strides = list(attributes.get("strides") or [1] * len(size))
        self.dilations = list(attributes.get("dilations") or [1] * len(size))
        self._size = size
        self._pads = list(attributes.get("pads") or [0] * (2 * len(size)))
        self._auto_pad = attributes.get("auto_pad")

    def padding(self) -> list[int]:
        """Return the padding in PyTorch's order: the last axis first, begin and end of each."""
        begin, end = self._same() if self._auto_pad in ("SAME_UPPER", "SAME_LOWER") else self._explicit()
        return [side for axis in reversed(range(len(self._size))) for side in (begin[axis], end[axis])]

    def _explicit(self) -> tuple[list[int], list[int]]:
        return self._pads[: len(self._size)], self._pads[len(self._size) :]

    def _same(self) -> tuple[list[int], list[int]]:
        each = zip(self._size, self.strides, self.kernel, self.dilations, strict=True)
        totals = [
            max(0, (-(-extent // stride) - 1) * stride + (width - 1) * step + 1 - extent)
            for extent, stride, width, step in each
        ]
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        return (small, large) if self._auto_pad == "SAME_UPPER" else (large, small)


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # torch warns of arrays it may not write to
