"""Quantization with static scales, which is elementwise, and with dynamic ones, which ties the images
together.
"""

from service.independence.proof.call import Call, Table, axis_of
from service.independence.proof.refusals import STATIC_QUANTIZATION, Mixed, Unproven
from service.independence.proof.rules.elementwise import broadcast, unary
from service.independence.proof.rules.selection import join
from service.independence.proof.values import Images, Value, as_fixed, known_shape


def linear(call: Call) -> Images:
    """QuantizeLinear and DequantizeLinear, by one scale or by one for each position of an axis."""
    images = call.images()
    if call.attribute("block_size", 0):
        raise Unproven("quantizes by blocks")
    for index in (1, 2):
        _check_scale(images, call, index)
    return images


def _check_scale(images: Images, call: Call, index: int) -> None:
    parameter = call.get(index)
    if isinstance(parameter, Images):
        raise Mixed("computes a scale from the images", STATIC_QUANTIZATION)
    if parameter is None:
        return
    shape = known_shape(as_fixed(parameter))
    many = any(dim != 1 for dim in shape)
    if many and axis_of(call.attribute("axis", 1), images.rank) == images.axis:
        raise Mixed("has a scale for each slot: it quantizes along the batch axis")


def dynamic(call: Call) -> Images:
    """Dynamic quantization, whose scale comes from the smallest and largest value of the whole batch."""
    if any(isinstance(value, Images) for value in call.inputs):
        raise Mixed(
            "takes one scale from the whole batch, so each image sets its neighbours' rounding",
            STATIC_QUANTIZATION,
        )
    raise Unproven("quantizes dynamically")


def qlinear_pair(call: Call) -> Images:
    """ONNX Runtime's QLinearAdd and QLinearMul: both tensors and the result have a scale and a zero point."""
    for index in (1, 2, 4, 5, 6, 7):
        _check_scalar(call, index)
    return broadcast([call.operand(0), call.operand(3)])


def qlinear_unary(call: Call) -> Images:
    """ONNX Runtime's quantized activations."""
    for index in range(1, len(call.inputs)):
        _check_scalar(call, index)
    return unary(call)


def qlinear_concat(call: Call) -> Images:
    """ONNX Runtime's QLinearConcat: the result's scale and zero point, then tensors with theirs."""
    for index in range(len(call.inputs)):
        if index % 3 != 2:
            _check_scalar(call, index)
    parts: list[Value] = [call.operand(index) for index in range(2, len(call.inputs), 3)]
    return join(parts, call.attribute("axis", 1))


def _check_scalar(call: Call, index: int) -> None:
    parameter = call.get(index)
    if isinstance(parameter, Images):
        raise Mixed("computes a scale from the images", STATIC_QUANTIZATION)
    if parameter is not None and any(dim != 1 for dim in known_shape(as_fixed(parameter))):
        raise Unproven("has more than one scale for a tensor")


RULES: Table = {("", name): linear for name in ("QuantizeLinear", "DequantizeLinear")}
RULES |= {("com.microsoft", name): linear for name in ("QuantizeLinear", "DequantizeLinear")}
RULES |= {("com.microsoft", name): qlinear_pair for name in ("QLinearAdd", "QLinearMul")}
RULES |= {("com.microsoft", name): qlinear_unary for name in ("QLinearLeakyRelu", "QLinearSigmoid")}
RULES |= {("", "DynamicQuantizeLinear"): dynamic, ("com.microsoft", "QLinearConcat"): qlinear_concat}
RULES |= {("com.microsoft", name): dynamic for name in ("DynamicQuantizeMatMul", "DynamicQuantizeLSTM")}
