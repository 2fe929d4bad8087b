"""Runs ONNX files by ONNX's own reference, in float64 or as stored; what that is slow at by PyTorch: OPERATORS."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional

from training.folding.graph_constants import FLOATS, graphs_inside

CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
AVERAGE_POOL = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
MAX_POOL = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


def evaluate(model: ModelProto, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Run a model and return every value of its graph by name. Raises whatever the reference raises."""
    evaluator = ReferenceEvaluator(model, new_ops=[*OPERATORS])
    names = [name for node in model.graph.node for name in node.output if name]
    with torch.no_grad(), np.errstate(all="ignore"):
        results = evaluator.run(names, dict(feeds))
    return dict(zip(names, results, strict=True))


def in_float64(model: ModelProto, exact: Mapping[str, NDArray[np.float64]] | None = None) -> ModelProto:
    """Return the model with every float type made float64, and initializers that `exact` names with its numbers."""
    copy = ModelProto()
    copy.CopyFrom(model)
    _widen(copy.graph, exact or {})
    return copy


def random_feeds(model: ModelProto, dtype: type[np.floating[Any]] | None = None) -> dict[str, NDArray[Any]]:
    """Return seeded random images for the inputs of a model: two where the batch is free, 32 where a size is.

    Raises ValueError for an input of unknown rank or of a type that is no number.
    """
    rng = np.random.default_rng(0)
    stored = {tensor.name for tensor in model.graph.initializer}
    return {entry.name: _random(entry, rng, dtype) for entry in model.graph.input if entry.name not in stored}


def _random(entry: Any, rng: np.random.Generator, dtype: type[np.floating[Any]] | None) -> NDArray[Any]:
    tensor = entry.type.tensor_type
    if not tensor.HasField("shape") or tensor.elem_type not in FLOATS | {TensorProto.UINT8}:
        raise ValueError(f"input {entry.name} cannot be made up")
    free = (2, *[32] * len(tensor.shape.dim))
    shape = [dim.dim_value or free[axis > 0] for axis, dim in enumerate(tensor.shape.dim)]
    if tensor.elem_type == TensorProto.UINT8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.standard_normal(shape).astype(dtype or helper.tensor_dtype_to_np_dtype(tensor.elem_type))


def _widen(graph: GraphProto, exact: Mapping[str, NDArray[np.float64]]) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
        if tensor.name in exact:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(exact[tensor.name]), tensor.name))
    del graph.value_info[:]
    for entry in (*graph.input, *graph.output):
        if entry.type.tensor_type.elem_type in FLOATS:
            entry.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in graph.node:
        for attribute in node.attribute:
            _widen_attribute(node.op_type, attribute)
    for inner in graphs_inside(graph.node):
        _widen(inner, exact)


def _widen_attribute(kind: str, attribute: AttributeProto) -> None:
    if attribute.type == AttributeProto.TENSOR:
        _widen_tensor(attribute.t)
    elif kind == "Cast" and attribute.name == "to" and attribute.i in FLOATS:
        attribute.i = TensorProto.DOUBLE
    elif kind == "Constant" and attribute.name in {"value_float", "value_floats"}:
        values = np.asarray(helper.get_attribute_value(attribute), np.float64)
        attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(values)))


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in FLOATS - {TensorProto.DOUBLE}:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


class BatchNormalization(OpRun):
    """At inference; the reference takes any file before opset 14 for training."""

    def _run(self, x: Any, scale: Any, bias: Any, mean: Any, var: Any, **given: Any) -> tuple[NDArray[Any]]:
        shape = (-1, *[1] * (x.ndim - 2))
        scale, bias, mean, var = (values.reshape(shape) for values in (scale, bias, mean, var))
        return (((x - mean) / np.sqrt(var + x.dtype.type(given["epsilon"])) * scale + bias).astype(x.dtype),)


class Conv(OpRun):
    """ONNX's Conv, computed by PyTorch."""

    def _run(self, x: Any, w: Any, b: Any = None, **given: Any) -> tuple[NDArray[Any]]:
        dims = w.ndim - 2
        ones = [1] * dims
        strides, dilations = given.get("strides") or ones, given.get("dilations") or ones
        pads = _pads(x.shape[2:], w.shape[2:], strides, dilations, given)
        padded = functional.pad(_tensor(x), pads)
        convolve: Any = CONVOLVE[dims]
        answer = convolve(padded, _tensor(w), _tensor(b), strides, 0, dilations, given.get("group") or 1)
        return (answer.numpy(),)


class ConvTranspose(OpRun):
    """ONNX's ConvTranspose with padding in numbers, computed by PyTorch; the reference knows no groups."""

    def _run(self, x: Any, w: Any, b: Any = None, **given: Any) -> tuple[NDArray[Any]]:
        dims = w.ndim - 2
        if (given.get("auto_pad") or "NOTSET") != "NOTSET" or given.get("output_shape"):
            raise NotImplementedError("padding chosen by the operator")
        ones, zeros = [1] * dims, [0] * dims
        added, pads = given.get("output_padding") or zeros, given.get("pads") or zeros * 2
        convolve: Any = TRANSPOSED[dims]
        steps = given.get("strides") or ones, zeros, zeros, given.get("group") or 1, given.get("dilations") or ones
        answer = convolve(_tensor(x), _tensor(w), _tensor(b), *steps)
        cut = [added[axis] - pads[axis + dims] if side else -pads[axis] for axis in range(dims) for side in (0, 1)]
        grown = [cut[2 * axis + side] for axis in reversed(range(dims)) for side in (0, 1)]
        bias = 0.0 if b is None else _tensor(b).reshape(-1, *ones)
        return ((functional.pad(answer - bias, grown) + bias).numpy(),)


class AveragePool(OpRun):
    """ONNX's AveragePool without dilations, computed by PyTorch."""

    def _run(self, x: Any, **given: Any) -> tuple[NDArray[Any]]:
        kernel = given["kernel_shape"]
        ones = [1] * len(kernel)
        if any(one != 1 for one in given.get("dilations") or ones):
            raise NotImplementedError("an average over spread pixels")
        strides = given.get("strides") or ones
        pads = _pads(x.shape[2:], kernel, strides, ones, given)
        pool: Any = AVERAGE_POOL[len(kernel)]
        rounds_up = bool(given.get("ceil_mode"))
        padded, share = (
            pool(functional.pad(values, pads), kernel, strides, 0, rounds_up)
            for values in (_tensor(x), torch.ones_like(_tensor(x)))
        )
        return ((padded if given.get("count_include_pad") else padded / share).numpy(),)


class MaxPool(OpRun):
    """ONNX's MaxPool without indices, computed by PyTorch."""

    def _run(self, x: Any, **given: Any) -> tuple[NDArray[Any]]:
        kernel = given["kernel_shape"]
        ones = [1] * len(kernel)
        strides, dilations = given.get("strides") or ones, given.get("dilations") or ones
        pads = _pads(x.shape[2:], kernel, strides, dilations, given)
        padded = functional.pad(_tensor(x), pads, value=-torch.inf)
        pool: Any = MAX_POOL[len(kernel)]
        return (pool(padded, kernel, strides, 0, dilations, bool(given.get("ceil_mode"))).numpy(),)


class Erf(OpRun):
    """ONNX's Erf, computed by PyTorch; the reference calls Python for each number."""

    def _run(self, x: Any) -> tuple[NDArray[Any]]:
        return (torch.erf(_tensor(x)).numpy(),)


class Gelu(OpRun):
    """ONNX's Gelu, computed by PyTorch; the reference spells it out, with Erf."""

    def _run(self, x: Any, **given: Any) -> tuple[NDArray[Any]]:
        return (functional.gelu(_tensor(x), approximate=given.get("approximate") or "none").numpy(),)


OPERATORS = (BatchNormalization, Conv, ConvTranspose, AveragePool, MaxPool, Erf, Gelu)


def _tensor(values: Any) -> Any:
    return None if values is None else torch.from_numpy(np.array(values))


def _pads(sizes: Any, kernel: Any, strides: Any, dilations: Any, given: Mapping[str, Any]) -> list[int]:
    """Return padding as PyTorch counts it: last axis first, before and after."""
    mode, dims = given.get("auto_pad") or "NOTSET", len(kernel)
    pads = list(given.get("pads") or [0] * 2 * dims)
    if mode.startswith("SAME"):
        reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
        missing = [
            max((-(-size // stride) - 1) * stride + span - size, 0)
            for size, stride, span in zip(sizes, strides, reach, strict=True)
        ]
        small, large = [one // 2 for one in missing], [one - one // 2 for one in missing]
        pads = [*small, *large] if mode == "SAME_UPPER" else [*large, *small]
    return [pads[axis + side] for axis in reversed(range(dims)) for side in (0, dims)]
