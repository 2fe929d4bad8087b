"""Pieces that keep images apart by construction, in the many ways exporters write them."""

import numpy as np
from onnx import AttributeProto, helper

from proof_cases.pieces import SIDE, Builder, Piece, branch


def conv(b: Builder, x: str) -> str:
    """A 3 × 3 convolution."""
    return str(b.add("Conv", x, b.normal(b.channels, b.channels, 3, 3), pads=[1] * 4))


def depthwise(b: Builder, x: str) -> str:
    """A depthwise convolution with bias."""
    weight, bias = b.normal(b.channels, 1, 3, 3), b.normal(b.channels)
    return str(b.add("Conv", x, weight, bias, pads=[1] * 4, group=b.channels))


def activation(b: Builder, x: str) -> str:
    """X · sigmoid(x)."""
    return str(b.add("Mul", x, b.add("Sigmoid", x)))


def norm(b: Builder, x: str) -> str:
    """BatchNormalization with running statistics."""
    scale, bias, mean = (b.normal(b.channels) for _ in range(3))
    variance = b.constant(b.rng.uniform(0.5, 2, b.channels))
    return str(b.add("BatchNormalization", x, scale, bias, mean, variance))


def instance_norm(b: Builder, x: str) -> str:
    """InstanceNormalization."""
    return str(b.add("InstanceNormalization", x, b.normal(b.channels), b.normal(b.channels)))


def layer_norm_written_out(b: Builder, x: str) -> str:
    """Normalization over the last axis, in six nodes."""
    centred = b.add("Sub", x, b.reduce("Mean", x, [-1]))
    variance = b.reduce("Mean", b.add("Mul", centred, centred), [3])
    return str(b.add("Div", centred, b.add("Sqrt", b.add("Add", variance, b.constant(0.1)))))


def squeeze_excitation(b: Builder, x: str) -> str:
    """Channels gated by their means."""
    gate = b.add("Conv", b.add("GlobalAveragePool", x), b.normal(b.channels, b.channels, 1, 1))
    return str(b.add("Mul", x, b.add("Sigmoid", gate)))


def gate_without_kept_axes(b: Builder, x: str) -> str:
    """The same by a mean that drops its axes and a matrix product."""
    gate = b.add("MatMul", b.reduce("Mean", x, [2, 3], keepdims=0), b.normal(b.channels, b.channels))
    return str(b.add("Mul", x, b.unsqueeze(b.add("Sigmoid", gate), 2, 3)))


def softmax_over_width(b: Builder, x: str) -> str:
    """Softmax over the last axis, where old and new semantics agree."""
    return b.blend(x, b.add("Softmax", x, axis=3))


def shuffle(b: Builder, x: str) -> str:
    """A channel shuffle of known sizes."""
    parted = b.reshape(x, -1, 2, b.channels // 2, SIDE, SIDE)
    return b.reshape(b.add("Transpose", parted, perm=[0, 2, 1, 3, 4]), -1, b.channels, SIDE, SIDE)


def shuffle_by_shape(b: Builder, x: str) -> str:
    """A channel shuffle whose target is computed from the shape."""
    batch = b.unsqueeze(b.batch_size(x), 0)
    target = b.add("Concat", batch, b.ints(2, b.channels // 2, SIDE, SIDE), axis=0)
    turned = b.add("Transpose", b.add("Reshape", x, target), perm=[0, 2, 1, 3, 4])
    return str(b.add("Reshape", turned, b.add("Shape", x)))


def flatten_and_back(b: Builder, x: str) -> str:
    """A matrix product on flattened images."""
    flat = b.add("Flatten", x)
    size = b.channels * SIDE * SIDE
    return str(b.add("Reshape", b.add("MatMul", flat, b.normal(size, size)), b.add("Shape", x)))


def fold_channels_into_batch(b: Builder, x: str) -> str:
    """Every channel as an image of its own, and back."""
    folded = b.reshape(x, -1, 1, SIDE, SIDE)
    return b.reshape(b.add("Conv", folded, b.normal(1, 1, 3, 3), pads=[1] * 4), -1, b.channels, SIDE, SIDE)


def fold_by_multiplying(b: Builder, x: str) -> str:
    """The same, with N · channels computed."""
    rows = b.add("Mul", b.batch_size(x), b.constant(b.channels, np.int64))
    target = b.add("Concat", b.unsqueeze(rows, 0), b.ints(1, SIDE, SIDE), axis=0)
    folded = b.add("Softmax", b.add("Reshape", x, target), axis=3)
    return b.blend(x, b.add("Reshape", folded, b.add("Shape", x)))


def channels_first_rows(b: Builder, x: str) -> str:
    """Channels merged in front of the batch, as attention over [length, N, width] does, and parted again."""
    rows = b.reshape(b.swap(x), -1, SIDE * SIDE)
    mapped = b.add("MatMul", rows, b.normal(SIDE * SIDE, SIDE * SIDE))
    return b.swap(b.reshape(mapped, b.channels, -1, SIDE, SIDE))


def swap_twice(b: Builder, x: str) -> str:
    """Something elementwise while batch and channels are exchanged."""
    return b.swap(b.add("Relu", b.swap(x)))


def attention(b: Builder, x: str) -> str:
    """Every channel attends to the others of its image."""
    tokens = b.reshape(x, 0, b.channels, -1)
    scores = b.add("MatMul", tokens, b.add("Transpose", tokens, perm=[0, 2, 1]))
    mixed = b.add("MatMul", b.add("Softmax", scores, axis=2), tokens)
    return str(b.add("Reshape", mixed, b.add("Shape", x)))


def einsum(b: Builder, x: str) -> str:
    """A channel map as a sum over letters."""
    return str(b.add("Einsum", x, b.normal(b.channels, b.channels), equation="nchw,ck->nkhw"))


def halves_swapped(b: Builder, x: str) -> str:
    """Split and Concat along the channels."""
    first, second = b.add("Split", x, outputs=2, axis=1, **({"num_outputs": 2} if b.opset >= 18 else {}))
    return str(b.add("Concat", second, first, axis=1))


def sliced_and_padded(b: Builder, x: str) -> str:
    """A border cut off and filled again, with the whole batch named in the Slice."""
    inner = b.slice(b.slice(x, 0, 0, 2**62), 2, 1, 2**31 - 1)
    return str(b.add("Pad", inner, b.ints(0, 0, 1, 0, 0, 0, 0, 0)))


def channels_reversed(b: Builder, x: str) -> str:
    """Channels gathered in another order."""
    return str(b.add("Gather", x, b.ints(*reversed(range(b.channels))), axis=1))


def pooled_and_resized(b: Builder, x: str) -> str:
    """Pooling, then nearest neighbours by scales."""
    pooled = b.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    return str(b.add("Resize", pooled, b.constant([]), b.constant([1, 1, 2, 2]), mode="nearest"))


def running_sum(b: Builder, x: str) -> str:
    """CumSum along the height."""
    return b.blend(x, b.add("CumSum", x, b.constant(2, np.int64)))


def largest_first(b: Builder, x: str) -> str:
    """TopK along the width: a sort within each row."""
    return str(b.add("TopK", x, b.ints(SIDE), outputs=2, axis=3)[0])


def quantized(b: Builder, x: str) -> str:
    """Quantization with a static scale."""
    scale, zero = b.constant(0.05), b.constant(128, np.uint8)
    return str(b.add("DequantizeLinear", b.add("QuantizeLinear", x, scale, zero), scale, zero))


def token_expanded(b: Builder, x: str) -> str:
    """A constant expanded to the batch, then added."""
    target = b.add("Concat", b.unsqueeze(b.batch_size(x), 0), b.ints(1, 1, 1), axis=0)
    return str(b.add("Add", x, b.add("Expand", b.normal(b.channels, SIDE, SIDE), target)))


def filled_and_multiplied(b: Builder, x: str) -> str:
    """Ones in the batch's own shape."""
    return str(
        b.add(
            "Mul",
            x,
            b.add("ConstantOfShape", b.add("Shape", x), value=helper.make_tensor("v", 1, [1], [1.5])),
        )
    )


def if_on_channels(b: Builder, x: str) -> str:
    """A branch that the number of channels decides."""
    count = b.add("Gather", b.add("Shape", x), b.constant(1, np.int64), axis=0)
    yes = b.add("Equal", count, b.constant(b.channels, np.int64))
    then, other = branch(b.name(), "Relu", x), branch(b.name(), "Softmax", x, axis=0)
    return str(b.add("If", yes, then_branch=then, else_branch=other))


def local_function(b: Builder, x: str) -> str:
    """A function of the file, with an attribute."""
    body = [helper.make_node("Softmax", ["a"], ["s"]), helper.make_node("Mul", ["a", "s"], ["r"])]
    body[0].attribute.add(name="axis", type=AttributeProto.INT, ref_attr_name="along")
    imports = [helper.make_opsetid("", b.opset)]
    function = helper.make_function("local", f"f{b.made}", ["a"], ["r"], body, imports, attributes=["along"])
    b.functions.append(function)
    return str(b.add(function.name, x, domain="local", along=3))


def own_addresses(b: Builder, x: str) -> str:
    """Elements of each image picked by address, as torch.export writes as_strided."""
    size = b.channels * SIDE * SIDE
    slots = b.add("Range", b.constant(0, np.int64), b.batch_size(x), b.constant(1, np.int64))
    start = b.unsqueeze(b.add("Mul", slots, b.constant(size, np.int64)), 1, 2, 3)
    offsets = b.constant(b.rng.permutation(size).reshape(1, b.channels, SIDE, SIDE), np.int64)
    return str(b.add("Gather", b.reshape(x, -1), b.add("Add", start, offsets), axis=0))


KEEPING: tuple[Piece, ...] = (
    conv, depthwise, activation, norm, instance_norm, layer_norm_written_out, squeeze_excitation,
    gate_without_kept_axes, softmax_over_width, shuffle, shuffle_by_shape, flatten_and_back,
    fold_channels_into_batch, fold_by_multiplying, channels_first_rows, swap_twice, attention, einsum,
    halves_swapped, sliced_and_padded, channels_reversed, pooled_and_resized, running_sum, largest_first,
    quantized, token_expanded, filled_and_multiplied, if_on_channels, local_function, own_addresses,
)  # fmt: skip
