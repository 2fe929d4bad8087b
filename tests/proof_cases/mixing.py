"""Pieces that let something of the batch into an image's result, from the blunt to the subtle."""

import numpy as np
from onnx import TensorProto

from proof_cases.pieces import SIDE, Builder, Piece, branch


def batch_statistics(b: Builder, x: str) -> str:
    """Normalization by the batch's own mean and variance, written out."""
    centred = b.add("Sub", x, b.reduce("Mean", x, [0, 2, 3]))
    variance = b.reduce("Mean", b.add("Mul", centred, centred), [0, 2, 3])
    return str(b.add("Div", centred, b.add("Sqrt", b.add("Add", variance, b.constant(0.1)))))


def training_norm(b: Builder, x: str) -> str:
    """BatchNormalization in training mode, where this opset can say so."""
    if b.opset < 14:
        return batch_statistics(b, x)
    parameters = [b.constant(np.ones(b.channels)) for _ in range(4)]
    return str(b.add("BatchNormalization", x, *parameters, outputs=3, training_mode=1)[0])


def scaled_by_the_largest(b: Builder, x: str) -> str:
    """Division by the largest value of all."""
    return str(b.add("Div", x, b.reduce("Max", b.add("Abs", x), None)))


def dynamic_quantization(b: Builder, x: str) -> str:
    """One scale for the batch."""
    return str(b.add("DequantizeLinear", *b.add("DynamicQuantizeLinear", x, outputs=3)))


def softmax_over_batch(b: Builder, x: str) -> str:
    """Softmax along axis 0, or over everything before opset 13."""
    return str(b.add("Softmax", x, axis=0))


def softmax_over_the_last_of_a_turned(b: Builder, x: str) -> str:
    """Softmax over the last axis after the batch was moved there."""
    turned = b.add("Transpose", x, perm=[1, 2, 3, 0])
    return str(b.add("Transpose", b.add("Softmax", turned, axis=3), perm=[3, 0, 1, 2]))


def sum_so_far(b: Builder, x: str) -> str:
    """CumSum along the batch."""
    return str(b.add("CumSum", x, b.constant(0, np.int64)))


def reversed_batch(b: Builder, x: str) -> str:
    """The batch backwards."""
    return b.slice(x, 0, -1, -(2**31), -1)


def first_image(b: Builder, x: str) -> str:
    """Something of the first image in all."""
    return b.blend(x, b.add("Gather", x, b.ints(0), axis=0))


def last_image(b: Builder, x: str) -> str:
    """Something of the last image in all."""
    return b.blend(x, b.slice(x, 0, -1, 2**31))


def sorted_over_batch(b: Builder, x: str) -> str:
    """TopK along the batch."""
    count = b.unsqueeze(b.batch_size(x), 0)
    return str(b.add("TopK", x, count, outputs=2, axis=0)[0])


def place_of_the_largest(b: Builder, x: str) -> str:
    """ArgMax over the batch."""
    return b.blend(x, b.add("Cast", b.add("ArgMax", x, axis=0), to=TensorProto.FLOAT))


def slot_number(b: Builder, x: str) -> str:
    """The slot's number added."""
    slots = b.add("Range", b.constant(0, np.int64), b.batch_size(x), b.constant(1, np.int64))
    return b.blend(x, b.unsqueeze(b.add("Cast", slots, to=TensorProto.FLOAT), 1, 2, 3))


def batch_size(b: Builder, x: str) -> str:
    """Division by N."""
    return str(b.add("Div", x, b.add("Cast", b.batch_size(x), to=TensorProto.FLOAT)))


def is_alone(b: Builder, x: str) -> str:
    """Another way for an image that comes alone."""
    yes = b.add("Equal", b.batch_size(x), b.constant(1, np.int64))
    then, other = branch(b.name(), "Relu", x), branch(b.name(), "Neg", x)
    return str(b.add("If", yes, then_branch=then, else_branch=other))


def if_on_content(b: Builder, x: str) -> str:
    """A way that the largest value of all decides."""
    yes = b.add("Greater", b.reduce("Max", x, None, keepdims=0), b.constant(8.0))
    then, other = branch(b.name(), "Relu", x), branch(b.name(), "Neg", x)
    return str(b.add("If", yes, then_branch=then, else_branch=other))


def misread_channels(b: Builder, x: str) -> str:
    """Memory read as if channels came first."""
    return b.swap(b.reshape(x, b.channels, -1, SIDE, SIDE))


def misread_turned(b: Builder, x: str) -> str:
    """A turned tensor read as if it were not."""
    return str(b.add("Reshape", b.swap(x), b.add("Shape", x)))


def misread_rows(b: Builder, x: str) -> str:
    """Rows merged with channels in front, then read with the batch in front."""
    return b.reshape(b.reshape(b.swap(x), -1, SIDE * SIDE), -1, b.channels, SIDE, SIDE)


def conv_over_batch(b: Builder, x: str) -> str:
    """A convolution whose height is the batch."""
    turned = b.add("Transpose", x, perm=[2, 1, 0, 3])
    mapped = b.add("Conv", turned, b.normal(b.channels, b.channels, 3, 3), pads=[1] * 4)
    return str(b.add("Transpose", mapped, perm=[2, 1, 0, 3]))


def gram(b: Builder, x: str) -> str:
    """Every image as a sum over all, weighted by likeness."""
    flat = b.add("Flatten", x)
    likeness = b.add("Softmax", b.add("MatMul", flat, b.add("Transpose", flat)), axis=1)
    return b.blend(x, b.add("Reshape", b.add("MatMul", likeness, flat), b.add("Shape", x)))


def einsum_over_batch(b: Builder, x: str) -> str:
    """A sum over the letter of the batch."""
    return b.blend(x, b.add("Einsum", x, equation="nchw->chw"))


def random_noise(b: Builder, x: str) -> str:
    """Random numbers added."""
    return b.blend(x, b.add("RandomNormalLike", x))


def norm_along_batch(b: Builder, x: str) -> str:
    """Unit length along the batch."""
    return str(b.add("LpNormalization", x, axis=0))


def default_mean_variance(b: Builder, x: str) -> str:
    """MeanVarianceNormalization, whose default axes hold the batch."""
    return str(b.add("MeanVarianceNormalization", x))


def above_average(b: Builder, x: str) -> str:
    """A mask by the mean of all."""
    return str(b.add("Where", b.add("Greater", x, b.reduce("Mean", x, None)), x, b.constant(0.0)))


def neighbours_address(b: Builder, x: str) -> str:
    """Elements picked by an address that runs into the next image."""
    size = b.channels * SIDE * SIDE
    slots = b.add("Range", b.constant(0, np.int64), b.batch_size(x), b.constant(1, np.int64))
    start = b.unsqueeze(b.add("Mul", slots, b.constant(size - 1, np.int64)), 1, 2, 3)
    offsets = b.constant(np.arange(size).reshape(1, b.channels, SIDE, SIDE), np.int64)
    return str(b.add("Gather", b.reshape(x, -1), b.add("Add", start, offsets), axis=0))


def constant_by_slot(b: Builder, x: str) -> str:
    """A constant for each of four slots."""
    return str(b.add("Add", x, b.normal(4, 1, 1, 1)))


def padded_batch(b: Builder, x: str) -> str:
    """The batch moved by one slot."""
    padded = b.add("Pad", x, b.ints(1, 0, 0, 0, 0, 0, 0, 0))
    return b.slice(padded, 0, 0, -1)


MIXING: tuple[Piece, ...] = (
    batch_statistics, training_norm, scaled_by_the_largest, dynamic_quantization, softmax_over_batch,
    softmax_over_the_last_of_a_turned, sum_so_far, reversed_batch, first_image, last_image,
    sorted_over_batch, place_of_the_largest, slot_number, batch_size, is_alone, if_on_content,
    misread_channels, misread_turned, misread_rows, conv_over_batch, gram, einsum_over_batch, random_noise,
    norm_along_batch, default_mean_variance, above_average, neighbours_address, constant_by_slot,
    padded_batch,
)  # fmt: skip
