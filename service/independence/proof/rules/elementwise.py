"""Operators that compute each element from those at its own place: activations, arithmetic, comparisons."""

from service.independence.proof.call import Call, Table
from service.independence.proof.extents import Dim
from service.independence.proof.refusals import SYMBOLIC_BATCH, Mixed, Unproven
from service.independence.proof.values import Images, Value, as_fixed, known_shape

UNARY = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Cos",
    "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid",
    "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip
BROADCAST = (
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Clip", "Div", "Equal", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow",
    "Sub", "Sum", "Where", "Xor",
)  # fmt: skip
UNALIGNED = "combines operands that hold an image's rows in different orders"


def unary(call: Call) -> Images:
    """One tensor in, the same shape out; of its second input CastLike reads only the type."""
    return call.images()


def elementwise(call: Call) -> Images:
    """Several tensors under NumPy's broadcasting, which aligns axes from the right (ONNX, Broadcasting in
    ONNX).
    """
    if "broadcast" in call.attributes:
        raise Unproven("broadcasts by attribute, as opsets before 7 did")
    return broadcast([value for value in call.inputs if value is not None])


def broadcast(operands: list[Value]) -> Images:
    """Combine operands element by element, at least one of which carries images."""
    images = [value for value in operands if isinstance(value, Images)]
    ends = {value.axis - value.rank for value in images}
    if len(ends) > 1:
        raise Mixed("pairs every image with every other: its operands carry the images on different axes")
    end = ends.pop()
    if len({value.layout for value in images}) > 1:
        raise Unproven(UNALIGNED)
    shapes = [value.share if isinstance(value, Images) else _flat_along(value, end) for value in operands]
    share = broadcast_dims(shapes)
    return images[0].kept(len(share) + end, share)


def _flat_along(value: Value, end: int) -> tuple[Dim, ...]:
    shape = known_shape(as_fixed(value))
    check_flat(shape, end)
    return shape


def check_flat(shape: tuple[Dim, ...], end: int) -> None:
    """Refuse a constant of more than one element along the batch axis, which is `end` (negative)."""
    extent = shape[end] if -end <= len(shape) else 1
    if extent is None:
        raise Unproven("has a constant operand of unknown extent along the batch axis")
    if extent != 1:
        reason = f"has a constant operand of extent {extent} along the batch axis, so each slot gets its own value"
        raise Mixed(reason, SYMBOLIC_BATCH)


def broadcast_dims(shapes: list[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    """The shape that these broadcast to; an unknown extent yields to any but 1."""
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(_broadcast_axis(set(dims)) for dims in zip(*padded, strict=True))


def _broadcast_axis(dims: set[Dim]) -> Dim:
    known = {dim for dim in dims if dim not in (None, 1)}
    if len(known) > 1:
        raise Unproven(f"has operands whose extents {sorted(dim for dim in known if dim)} do not broadcast")
    if known:
        return known.pop()
    return None if None in dims else 1


RULES: Table = {("", name): unary for name in (*UNARY, "CastLike")}
RULES |= {("", name): elementwise for name in BROADCAST}
RULES |= {("com.microsoft", name): unary for name in ("Gelu", "QuickGelu")}
RULES |= {("com.microsoft", name): elementwise for name in ("BiasGelu", "FastGelu")}
