"""Matrix products: the batch axis may lead or be a free row or column, never the axis that is summed over."""

from collections.abc import Sequence

from service.independence.proof.call import Call, Table
from service.independence.proof.extents import Dim
from service.independence.proof.refusals import STATIC_QUANTIZATION, Mixed, Unproven
from service.independence.proof.rules.elementwise import UNALIGNED, broadcast, broadcast_dims, check_flat
from service.independence.proof.rules.windows import leading
from service.independence.proof.values import Images, Value, as_fixed, known_shape

CONTRACTS = "sums over the images: its inner axis is the batch axis"


def matmul(call: Call) -> Images:
    """Matrix product under NumPy's rules for leading axes."""
    return product_of(call.operand(0), call.operand(1))


def product_of(left: Value, right: Value) -> Images:
    """The matrix product of two tensors, at least one of which carries images."""
    a, b = _shape(left), _shape(right)
    _check_inner(left, right)
    if len(a) == 1 or len(b) == 1:
        return _with_vector(left, right, a, b)
    ends = {_end(value) for value in (left, right) if isinstance(value, Images)}
    if len(ends) > 1:
        raise Mixed("pairs every image with every other: its operands carry the images on different axes")
    end = ends.pop()
    _check_other_side(left, right, end)
    share = (*broadcast_dims([a[:-2], b[:-2]]), a[-2], b[-1])
    return next(value for value in (left, right) if isinstance(value, Images)).kept(len(share) + end, share)


def _shape(value: Value) -> tuple[Dim, ...]:
    shape = value.share if isinstance(value, Images) else known_shape(as_fixed(value))
    if not shape:
        raise Unproven("multiplies a scalar as a matrix")
    return shape


def _end(images: Images) -> int:
    return images.axis - images.rank


def _check_inner(left: Value, right: Value) -> None:
    inner_right = -2 if len(_shape(right)) > 1 else -1
    for value, inner in ((left, -1), (right, inner_right)):
        if isinstance(value, Images) and _end(value) == inner:
            raise Mixed(CONTRACTS)


def _check_other_side(left: Value, right: Value, end: int) -> None:
    """Opposite stands a constant, of extent 1 along a leading batch axis, or images on the same one."""
    both = isinstance(left, Images) and isinstance(right, Images)
    if both and end >= -2:
        raise Mixed("pairs every image with every other")
    if both and left.layout != right.layout:  # type: ignore[union-attr]
        raise Unproven(UNALIGNED)
    for value in (left, right):
        if not isinstance(value, Images) and end < -2:
            check_flat(known_shape(as_fixed(value)), end)


def _with_vector(left: Value, right: Value, a: tuple[Dim, ...], b: tuple[Dim, ...]) -> Images:
    """One operand is a fixed vector, whose axis is summed over and gone."""
    if isinstance(left, Images) and isinstance(right, Images):
        raise Unproven("multiplies images by a vector of images")
    if isinstance(left, Images):
        return left.kept(left.axis, a[:-1])
    assert isinstance(right, Images), "the caller passes images on one side"
    axis = right.axis - (1 if right.axis == right.rank - 1 else 0)
    return right.kept(axis, (*b[:-2], b[-1]))


def gemm(call: Call) -> Images:
    """α·A·B + β·C on matrices, either of which may be transposed first."""
    left = _turned(call.operand(0), call.attribute("transA", 0))
    right = _turned(call.operand(1), call.attribute("transB", 0))
    found = product_of(left, right)
    addend = call.get(2)
    return found if addend is None else broadcast([found, addend])


def _turned(value: Value, turn: int) -> Value:
    if not turn:
        return value
    if isinstance(value, Images):
        return value.kept(value.rank - 1 - value.axis, value.share[::-1])
    fixed = as_fixed(value)
    return type(fixed)(known_shape(fixed)[::-1])


def integer_matmul(call: Call) -> Images:
    """MatMulInteger; a zero point given row by row would tell slots apart."""
    return _quantized_product(call, 0, 1, left_scales=(2,), right_scales=(3,))


def qlinear_matmul(call: Call) -> Images:
    """QLinearMatMul, with static scales."""
    return _quantized_product(call, 0, 3, left_scales=(1, 2), right_scales=(4, 5), others=(6, 7))


def matmul_integer_to_float(call: Call) -> Images:
    """ONNX Runtime's MatMulIntegerToFloat, with static scales."""
    found = _quantized_product(call, 0, 1, left_scales=(2, 4), right_scales=(3, 5))
    addend = call.get(6)
    return found if addend is None else broadcast([found, addend])


def qgemm(call: Call) -> Images:
    """ONNX Runtime's QGemm: quantized Gemm with static scales and an integer addend."""
    for index in (1, 2, 4, 5, 7, 8):
        _check_scalar_for(call.operand(0) if index in (1, 2, 7, 8) else call.operand(3), call, index)
    left = _turned(call.operand(0), call.attribute("transA", 0))
    found = product_of(left, _turned(call.operand(3), call.attribute("transB", 0)))
    addend = call.get(6)
    return found if addend is None else broadcast([found, addend])


def _quantized_product(
    call: Call,
    left: int,
    right: int,
    left_scales: Sequence[int],
    right_scales: Sequence[int],
    others: Sequence[int] = (),
) -> Images:
    for place, parameters in ((left, (*left_scales, *others)), (right, right_scales)):
        for index in parameters:
            _check_scalar_for(call.operand(place), call, index)
    return product_of(call.operand(left), call.operand(right))


def _check_scalar_for(value: Value, call: Call, index: int) -> None:
    """A scale or zero point of images must be one number; for fixed weights it may be a list."""
    parameter = call.get(index)
    if parameter is None:
        return
    if isinstance(parameter, Images):
        raise Mixed("computes a scale from the images", STATIC_QUANTIZATION)
    shape = as_fixed(parameter).shape
    if isinstance(value, Images) and (shape is None or any(dim != 1 for dim in shape)):
        raise Unproven("quantizes images with more than one scale")


def einsum(call: Call) -> Images:
    """Einstein summation, where the letter of the batch axis must stay, the same for all operands."""
    equation = call.attribute("equation", b"").decode().replace(" ", "")
    if "." in equation or "->" not in equation:
        raise Unproven(f"has an equation without a rule: {equation}")
    terms, result = equation.split("->")
    operands = [(term, value) for term, value in zip(terms.split(","), call.inputs, strict=True) if value is not None]
    letters = {term[value.axis] for term, value in operands if isinstance(value, Images)}
    if len(letters) > 1:
        raise Mixed("pairs every image with every other: its operands carry the images on different letters")
    letter = letters.pop()
    if result.count(letter) != 1:
        raise Mixed(f"sums over {letter!r}, the batch axis")
    images = [value for value in call.inputs if isinstance(value, Images)]
    if len({value.layout for value in images}) > 1:
        raise Unproven(UNALIGNED)
    dims: dict[str, Dim] = {}
    for term, value in operands:
        _read_term(term, value, letter, dims)
    return images[0].kept(result.index(letter), tuple(dims[name] for name in result))


def _read_term(term: str, value: Value, letter: str, dims: dict[str, Dim]) -> None:
    shape = _shape(value)
    if len(shape) != len(term) or term.count(letter) > 1:
        raise Unproven(f"has a term {term} that does not fit its operand")
    if letter in term and not isinstance(value, Images):
        raise Mixed("has a constant operand with an extent along the batch axis")
    for name, dim in zip(term, shape, strict=True):
        if dims.setdefault(name, dim) != dim:
            raise Unproven(f"gives {name!r} different extents")


def attention(call: Call) -> Images:
    """Attention within each image (ONNX Attention, opset 23), without a cache of earlier keys."""
    query, key, value = (leading(call.images(index)) for index in range(3))
    if any(call.get(index) is not None for index in (4, 5, 6)) or any(call.wanted[1:]):
        raise Unproven("attends with a cache of keys or returns it")
    if len({(part.layout, part.rank) for part in (query, key, value)}) > 1:
        raise Unproven("attends between tensors of different layout")
    if (mask := call.get(3)) is not None:
        check_flat(known_shape(as_fixed(mask)), -4)
    if query.rank == 4:
        return query.resized(3, value.share[3])
    heads, own = call.attribute("kv_num_heads"), call.attribute("q_num_heads")
    width = value.share[2]
    return query.resized(2, None if width is None or not heads else width // heads * own)


RULES: Table = {
    ("", "MatMul"): matmul,
    ("", "Gemm"): gemm,
    ("", "Einsum"): einsum,
    ("", "Attention"): attention,
    ("", "MatMulInteger"): integer_matmul,
    ("", "QLinearMatMul"): qlinear_matmul,
    ("com.microsoft", "MatMulIntegerToFloat"): matmul_integer_to_float,
    ("com.microsoft", "QGemm"): qgemm,
}
