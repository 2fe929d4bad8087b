"""Random arithmetic on shapes: what the proof knows of it, with N put in, is what ONNX Runtime computes."""

from collections.abc import Callable

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from proof_cases.oracle import Run
from proof_cases.pieces import Builder

from service.independence.proof.extents import Times, Unknown
from service.independence.proof.rules import RULES
from service.independence.proof.values import Fixed, Images, Sizes, Value
from service.independence.proof.walk import Walk

SIZES = (1, 2, 3, 5)
Step = Callable[[st.DrawFn, Builder, str, int], tuple[str, int]]


def _pair(operator: str, low: int = 1) -> Step:
    """A step that combines a vector with small constants, from either side."""

    def step(draw: st.DrawFn, b: Builder, v: str, length: int) -> tuple[str, int]:
        other = b.ints(*(draw(st.integers(low, 6)) for _ in range(draw(st.sampled_from([1, length])))))
        operands = (v, other) if operator in ("Div", "Mod") or draw(st.booleans()) else (other, v)
        return b.add(operator, *operands), length

    return step


def pick(draw: st.DrawFn, b: Builder, v: str, length: int) -> tuple[str, int]:
    """Some elements, in any order."""
    places = draw(st.lists(st.integers(-length, length - 1), min_size=1, max_size=4))
    return b.add("Gather", v, b.ints(*places), axis=0), len(places)


def cut(draw: st.DrawFn, b: Builder, v: str, length: int) -> tuple[str, int]:
    """A part, forwards or backwards."""
    start = draw(st.integers(0, length - 1))
    if draw(st.booleans()):
        return b.slice(v, 0, start, 2**31 - 1), length - start
    return b.slice(v, 0, start, -(2**31), -1), start + 1


def lengthen(draw: st.DrawFn, b: Builder, v: str, length: int) -> tuple[str, int]:
    """The vector and a constant after it."""
    return b.add("Concat", v, b.ints(draw(st.integers(1, 6))), axis=0), length + 1


def total(draw: st.DrawFn, b: Builder, v: str, length: int) -> tuple[str, int]:
    """The sum, product, largest or smallest."""
    return b.reduce(draw(st.sampled_from(["Sum", "Prod", "Max", "Min"])), v, [0]), 1


def replace(draw: st.DrawFn, b: Builder, v: str, length: int) -> tuple[str, int]:
    """Another number where a comparison says so."""
    compare = draw(st.sampled_from(["Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"]))
    condition = b.add(compare, v, b.ints(draw(st.integers(-1, 6))))
    if draw(st.booleans()):
        condition = b.add("Not", condition)
    return b.add("Where", condition, v, b.ints(draw(st.integers(1, 6)))), length


def scalar_and_back(draw: st.DrawFn, b: Builder, v: str, length: int) -> tuple[str, int]:
    """One element without an axis, narrowed and widened, and an axis again."""
    one = b.add("Gather", v, b.constant(draw(st.integers(0, length - 1)), np.int64), axis=0)
    narrow = b.add("Cast", one, to=TensorProto.INT32)
    return b.unsqueeze(b.add("Cast", narrow, to=TensorProto.INT64), 0), 1


STEPS: tuple[Step, ...] = (
    _pair("Add"), _pair("Mul"), _pair("Sub"), _pair("Div"), _pair("Mod"), _pair("Max"), _pair("Min"), pick,
    cut, lengthen, total, replace, scalar_and_back,
)  # fmt: skip


@st.composite
def shape_arithmetic(draw: st.DrawFn) -> onnx.ModelProto:
    """One to six steps on the shape of the images."""
    builder = Builder(draw(st.sampled_from([13, 17, 20])), 6, np.random.default_rng(0))
    vector, length = builder.add("Shape", "x"), 4
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=6)):
        vector, length = step(draw, builder, vector, length)
    model = builder.model(vector)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(vector, TensorProto.INT64, [length]))
    return model


def what_is_known(model: onnx.ModelProto) -> Value:
    """The abstract value of the model's output."""
    walk = Walk(model, RULES)
    return walk.graph(model.graph, {"x": Images(0, (1, 6, 4, 4), outer=1)}, walk.around)[0]


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shape_arithmetic())
def test_known_sizes_are_those_of_a_run_at_every_batch_size(model: onnx.ModelProto) -> None:
    known, run = what_is_known(model), Run(model)
    for size in SIZES:
        actual = run(np.zeros((size, 6, 4, 4), np.float32))
        if isinstance(known, Fixed):
            assert known.value is None or np.array_equal(known.value, actual)
            continue
        assert isinstance(known, Sizes)
        assert known.items.shape == actual.shape
        for item, number in zip(known.items.flat, actual.flat, strict=True):
            expected = item.factor * size if isinstance(item, Times) else item
            assert isinstance(item, Unknown) or expected == number


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shape_arithmetic())
def test_sizes_called_the_same_for_every_batch_are_so(model: onnx.ModelProto) -> None:
    known, run = what_is_known(model), Run(model)
    results = [run(np.zeros((size, 6, 4, 4), np.float32)) for size in SIZES]
    if isinstance(known, Fixed):
        assert all(np.array_equal(result, results[0]) for result in results)
    elif isinstance(known, Sizes):
        free = np.array([item is Unknown.FREE for item in known.items.flat])
        assert all(np.array_equal(result.flat[free], results[0].flat[free]) for result in results)
