"""Wild graphs: random reshapes, transposes and operators along random axes, with nothing kept apart on
purpose.

Only extents are tracked, as (number, whether N times it), so that each graph runs at every batch size and
ends with one row an image. Whether the rows still belong to the images is for the proof to say and for a run
to refute.
"""

from collections.abc import Callable

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto

from proof_cases.pieces import Builder

Shape = tuple[tuple[int, bool], ...]
START: Shape = ((1, True), (2, False), (4, False), (3, False))


def wild_graphs(opsets: tuple[int, ...]) -> st.SearchStrategy[onnx.ModelProto]:
    """Two to seven random steps on images of shape (2, 4, 3)."""

    @st.composite
    def graph(draw: st.DrawFn) -> onnx.ModelProto:
        builder = Builder(draw(st.sampled_from(opsets)), 2, np.random.default_rng(draw(st.integers(0, 999))))
        name, shape = "x", START
        for step in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=7)):
            name, shape = step(draw, builder, name, shape)
        model = builder.model(_one_row_an_image(builder, name, shape))
        for axis, (number, varies) in enumerate(START):
            if not varies:
                model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = number
        return model

    return graph()


def _one_row_an_image(b: Builder, x: str, shape: Shape) -> str:
    place = next(axis for axis, (_, varies) in enumerate(shape) if varies)
    order = [place, *(axis for axis in range(len(shape)) if axis != place)]
    return b.reshape(b.add("Transpose", x, perm=order), -1, _numbers(shape))


def _numbers(shape: Shape) -> int:
    return int(np.prod([number for number, _ in shape]))


def _axis(draw: st.DrawFn, shape: Shape) -> int:
    return draw(st.integers(0, len(shape) - 1))


def transpose(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """Axes in another order."""
    order = draw(st.permutations(range(len(shape))))
    return b.add("Transpose", x, perm=list(order)), tuple(shape[axis] for axis in order)


def reshape(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """Other extents of the same product, with N on any of them, by −1 or by a computed multiple."""
    left, numbers = _numbers(shape), []
    for _ in range(draw(st.integers(0, 3))):
        numbers.append(draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0])))
        left //= numbers[-1]
    numbers.append(left)
    place = draw(st.integers(0, len(numbers) - 1))
    target = b.ints(*(-1 if axis == place else number for axis, number in enumerate(numbers)))
    if draw(st.booleans()):
        size = b.add("Shape", x)
        total = b.add("ReduceProd", size, keepdims=1, **({} if b.opset >= 18 else {"axes": [0]}))
        rows = b.add("Div", total, b.ints(_numbers(shape) // numbers[place]))
        parts = [rows if axis == place else b.ints(number) for axis, number in enumerate(numbers)]
        target = b.add("Concat", *parts, axis=0)
    return b.add("Reshape", x, target), tuple((number, axis == place) for axis, number in enumerate(numbers))


def along(operator: str) -> Callable[[st.DrawFn, Builder, str, Shape], tuple[str, Shape]]:
    """A step that applies an operator with an attribute `axis` along any axis."""

    def step(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
        return b.blend(x, b.add(operator, x, axis=_axis(draw, shape))), shape

    return step


def mean(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """The mean over any axis, added."""
    return b.blend(x, b.reduce("Mean", x, [_axis(draw, shape)])), shape


def dropped(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """The largest over an axis without N, which goes."""
    axis = _axis(draw, shape)
    if shape[axis][1]:
        return x, shape
    return b.reduce("Max", x, [axis], keepdims=0), shape[:axis] + shape[axis + 1 :]


def running(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """CumSum along any axis."""
    return b.blend(x, b.add("CumSum", x, b.constant(_axis(draw, shape), np.int64))), shape


def reverse(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """Any axis backwards."""
    return b.slice(x, _axis(draw, shape), -1, -(2**31), -1), shape


def matrix(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """A constant matrix on the last axis, where that has no N."""
    if shape[-1][1]:
        return x, shape
    width = draw(st.integers(1, 4))
    return b.add("MatMul", x, b.normal(shape[-1][0], width)), (*shape[:-1], (width, False))


def attend(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """Rows as a sum over rows, weighted by likeness, whatever a row is."""
    if len(shape) < 2:
        return x, shape
    order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    likeness = b.add("MatMul", x, b.add("Transpose", x, perm=order))
    return b.blend(x, b.add("MatMul", b.add("Softmax", likeness, axis=-1), x)), shape


def doubled(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """Joined with its own negative along an axis without N."""
    axis = _axis(draw, shape)
    number, varies = shape[axis]
    if varies or _numbers(shape) > 100:
        return x, shape
    joined = b.add("Concat", x, b.add("Neg", x), axis=axis)
    return joined, (*shape[:axis], (2 * number, False), *shape[axis + 1 :])


def constant(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """A constant added, of extent 1 along some axes and always along N."""
    extents = [1 if varies or draw(st.booleans()) else number for number, varies in shape]
    return b.add("Add", x, b.normal(*extents)), shape


def convolution(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """A 3 × 3 convolution, wherever N stands, unless on the channels."""
    if len(shape) != 4 or shape[1][1]:
        return x, shape
    width = draw(st.integers(1, 3))
    weights = b.normal(width, shape[1][0], 3, 3)
    return b.add("Conv", x, weights, pads=[1] * 4), (shape[0], (width, False), *shape[2:])


def instance(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """InstanceNormalization, wherever N stands, unless on the channels."""
    if len(shape) < 3 or shape[1][1]:
        return x, shape
    ones = b.constant(np.ones(shape[1][0]))
    return b.blend(x, b.add("InstanceNormalization", x, ones, ones)), shape


def expanded(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """A new axis of extent 1."""
    place = draw(st.integers(0, len(shape)))
    if len(shape) > 4:
        return x, shape
    return b.unsqueeze(x, place), (*shape[:place], (1, False), *shape[place:])


def positions(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """The place of the largest along any axis, added as a number."""
    best = b.add("ArgMax", x, axis=_axis(draw, shape))
    return b.blend(x, b.add("Cast", best, to=TensorProto.FLOAT)), shape


def twisted(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """The elements in memory order, plus those of a transposed copy in its order: one extent, two layouts."""
    order = draw(st.permutations(range(len(shape))))
    turned = b.reshape(b.add("Transpose", x, perm=list(order)), -1)
    return b.add("Reshape", b.blend(b.reshape(x, -1), turned), b.add("Shape", x)), shape


def crossed(draw: st.DrawFn, b: Builder, x: str, shape: Shape) -> tuple[str, Shape]:
    """An axis against itself, then the mean over one of the two."""
    axis = _axis(draw, shape)
    pairs = b.add("Mul", b.unsqueeze(x, axis), b.unsqueeze(x, axis + 1))
    return b.blend(x, b.reduce("Mean", pairs, [axis + draw(st.integers(0, 1))], keepdims=0)), shape


Step = Callable[[st.DrawFn, Builder, str, Shape], tuple[str, Shape]]
STEPS: tuple[Step, ...] = (
    transpose, transpose, reshape, reshape, reshape, along("Softmax"), along("LpNormalization"), mean,
    dropped, running, reverse, matrix, matrix, attend, doubled, constant, constant, convolution, instance,
    expanded, positions, twisted, crossed,
)  # fmt: skip
