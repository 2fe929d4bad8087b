"""Operators that take axis 0 for the batch by definition: convolution, pooling, normalization within an
image.
"""

from service.independence.proof.call import Call, Table, infer_share
from service.independence.proof.refusals import EVAL_MODE, Mixed, Unproven
from service.independence.proof.rules.elementwise import UNALIGNED, broadcast
from service.independence.proof.values import Images, Value, as_fixed

STATISTICS = "normalizes with statistics of the whole batch"


def leading(images: Images) -> Images:
    """The images, whose axis must be 0, where the operator expects the batch."""
    if images.axis != 0:
        raise Mixed(f"expects the batch on axis 0 but finds the images on axis {images.axis}, over which it works")
    return images


def windowed(call: Call) -> Images:
    """Convolution and pooling: each row of axis 0 comes from the same input row and fixed parameters."""
    leading(call.only_first())
    return _inferred(call, call.operator, call.inputs)


def integer_conv(call: Call) -> Images:
    """ConvInteger, and QLinearConv with static scales, whose shapes are those of Conv."""
    leading(call.only_first())
    weight = 3 if call.operator == "QLinearConv" else 1
    return _inferred(call, "Conv", (call.get(0), call.get(weight)))


def max_pool(call: Call) -> tuple[Value, ...]:
    """MaxPool; its indices count elements over the whole batch."""
    if len(call.wanted) > 1 and call.wanted[1]:
        raise Mixed("returns indices that count through the whole batch, so they depend on the slot")
    return (windowed(call),) * len(call.wanted)


def microsoft_window(call: Call) -> Images:
    """ONNX Runtime's fused and quantized forms, whose shapes are those of the plain operator."""
    if call.attribute("channels_last", 0):
        raise Unproven("works on channels-last tensors, for which there is no rule")
    leading(call.only_first())
    operator = call.operator.removeprefix("QLinear").removeprefix("Fused")
    return _inferred(call, operator, call.inputs[:3] if operator == "Conv" else call.inputs[:1])


def fused_conv(call: Call) -> Images:
    """Convolution, then the sum with an optional fourth input, then an activation."""
    addend = call.get(3)
    for index in (1, 2):
        call.fixed(index)
    leading(call.images())
    convolved = _inferred(call, "Conv", call.inputs[:3])
    return convolved if addend is None else broadcast([convolved, addend])


def _inferred(call: Call, operator: str, inputs: tuple[Value | None, ...]) -> Images:
    images, share = call.images(), infer_share(call, operator, inputs)
    if not share or share[0] != images.rows:
        raise Unproven("has an output whose shape could not be followed")
    return images.kept(0, share)


def batch_normalization(call: Call) -> Images:
    """BatchNormalization with running statistics.

    Training mode is an attribute since opset 14; before, it shows as extra outputs, and before 7 as
    is_test = 0.
    """
    training = call.attribute("training_mode", 0) or call.attribute("is_test", int(call.opset >= 7)) == 0
    if training or sum(1 for name in call.node.output if name) > 1:
        raise Mixed(f"{STATISTICS}: it is in training mode", EVAL_MODE)
    return leading(call.only_first())


def within_image(call: Call) -> Images:
    """Normalization over the channels or positions of one row of axis 0, with fixed weights."""
    return leading(call.only_first())


def deform_conv(call: Call) -> Images:
    """Deformable convolution, whose offsets and mask are images too."""
    for index in (1, 3):
        call.fixed(index)
    for index in (0, 2, 4):
        if call.get(index) is not None and leading(call.images(index)).layout != call.images().layout:
            raise Unproven(UNALIGNED)
    offsets, x = call.images(2), call.images()
    weight = as_fixed(call.operand(1)).shape
    return x.kept(0, (x.rows, weight[0] if weight else None, *offsets.share[2:]))


PER_IMAGE = (
    "AveragePool", "Conv", "ConvTranspose", "DepthToSpace", "GlobalAveragePool", "GlobalLpPool",
    "GlobalMaxPool", "LpPool", "SpaceToDepth",
)  # fmt: skip
RULES: Table = {("", name): windowed for name in PER_IMAGE}
RULES |= {("", name): within_image for name in ("GroupNormalization", "InstanceNormalization", "LRN")}
RULES |= {("", name): integer_conv for name in ("ConvInteger", "QLinearConv")}
RULES |= {
    ("", "BatchNormalization"): batch_normalization,
    ("", "DeformConv"): deform_conv,
    ("", "MaxPool"): max_pool,
}
RULES |= {("com.microsoft", "FusedConv"): fused_conv}
RULES |= {("com.microsoft", name): microsoft_window for name in ("QLinearAveragePool", "QLinearGlobalAveragePool")}
