"""What folds are held against: ONNX's own reference in float64, which is none of our code."""

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn
from torch.nn import functional

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE}


class BatchNormalization(OpRun):
    """The specification's formula at inference: before opset 14 the reference computes that of training."""

    def _run(self, x, scale, bias, mean, var, epsilon=1e-5, **_):
        scale, bias, mean, var = (one.reshape(-1, *[1] * (x.ndim - 2)) for one in (scale, bias, mean, var))
        return (((x - mean) / np.sqrt(var + x.dtype.type(epsilon)) * scale + bias).astype(x.dtype),)


class ConvTranspose(OpRun):
    """The reference knows no groups here: each group goes through its ConvTranspose, and the bias is added once."""

    def _run(self, x, w, b=None, group=1, **attributes):
        given = {name: value for name, value in attributes.items() if value is not None}
        node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], **given)
        plain = ReferenceEvaluator(node)
        parts = zip(np.split(x, group, axis=1), np.split(w, group, axis=0), strict=True)
        answer = np.concatenate([plain.run(None, {"x": one, "w": two})[0] for one, two in parts], axis=1)
        return (answer if b is None else answer + b.reshape(-1, *[1] * (w.ndim - 2)),)


class MaxPool(OpRun):
    """By PyTorch, for even padding: the reference writes past its own array for some sizes with padding."""

    def _run(self, x, kernel_shape=None, strides=None, pads=None, **_):
        pool = {1: functional.max_pool1d, 2: functional.max_pool2d}[len(kernel_shape)]
        return (pool(torch.from_numpy(np.array(x)), kernel_shape, strides, (pads or [0])[0]).numpy(),)


def float64(model: ModelProto, exact=None) -> ModelProto:
    """Return the model in float64, with the weights before rounding where `exact` has them."""
    copy = ModelProto.FromString(model.SerializeToString())
    for tensor in [*copy.graph.initializer, *(entry.t for node in copy.graph.node for entry in node.attribute)]:
        if tensor.data_type in FLOATS:
            values = (exact or {}).get(tensor.name, numpy_helper.to_array(tensor)) if tensor.name else (
                numpy_helper.to_array(tensor)
            )  # fmt: skip
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float64), tensor.name))
    for entry in (*copy.graph.input, *copy.graph.output):
        if entry.type.tensor_type.elem_type in FLOATS:
            entry.type.tensor_type.elem_type = TensorProto.DOUBLE
    del copy.graph.value_info[:]
    return copy


def outputs(model: ModelProto, images: np.ndarray) -> list[np.ndarray]:
    """Run a model of one input."""
    return ReferenceEvaluator(model, new_ops=[BatchNormalization, ConvTranspose, MaxPool]).run(
        None, {model.graph.input[0].name: images}
    )


def images_for(model: ModelProto, seed: int = 0) -> np.ndarray:
    """Return two random images in float64."""
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(seed).standard_normal((2, *shape[1:]))


def relative_error(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Return the largest difference over the largest magnitude, over all outputs."""
    return max(np.abs(one - two).max() / np.abs(two).max() for one, two in zip(found, wanted, strict=True))


class Joined(nn.Module):
    """A network of several outputs as one."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images):
        return torch.cat([answer.flatten(1) for answer in self.network(images)], 1)
