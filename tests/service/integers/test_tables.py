"""Functions of one byte: their 256 values, and the refusal of those that runtimes could read differently."""

from fractions import Fraction

import numpy as np
import pytest
from exact_support import FUNCTIONS, Graph, room_of, table_values, to_bytes
from hypothesis import given
from hypothesis import strategies as st

from service.errors import NotExact
from service.integers import read_steps
from service.integers.tables import LEAST_ROOM, round_to_bytes


def graph_of(build, x_scale: float = 0.05, x_zero: int = 0, y_scale: float = 0.05, y_zero: int = 0):
    """Return a model that applies to its pixels what `build` writes behind a dequantized tensor."""
    graph = Graph(np.zeros((1, 4, 4, 1), np.uint8))
    x = graph.planes()
    y = graph.quantize(build(graph, graph.dequantize(x, x_scale, x_zero)), y_scale, y_zero)
    graph.holds(y, graph.values[x])
    graph.head(y, np.ones((16, 2)), [0, 0], 1.0)
    return graph.model()


def table_of(model):
    (table,) = read_steps(model).tables()
    return table


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("x_zero, y_zero", [(0, 0), (128, 37), (255, 255)])
def test_the_entries_are_the_function_s_values_and_room_is_the_least_distance_to_a_tie(function, x_zero, y_zero):
    random = np.random.default_rng([x_zero, y_zero])
    while True:
        x_scale, y_scale = random.uniform(0.01, 0.1), random.uniform(0.004, 0.05)
        values = table_values(function, x_scale, x_zero, y_scale)
        if room_of(values) > 1.1 * LEAST_ROOM:
            break
    graph = Graph(np.zeros((1, 4, 4, 1), np.uint8))
    y = graph.table(function, graph.planes(), x_scale, x_zero, y_scale, y_zero)
    graph.head(y, np.ones((16, 2)), [0, 0], 1.0)

    table = table_of(graph.model())

    assert table.entries.dtype == np.uint8
    assert np.array_equal(table.entries, to_bytes(values, y_zero))
    assert table.room >= room_of(values) - 1e-5, "ties beyond the ends do not count"  # ONNX's 1/6 and erf are float32


def quarter(graph, real):
    """Return a step that puts every fourth value on a tie."""
    return graph.node("Mul", [real, graph.constant(np.float32(0.25))])


def near_a_tie(distance: float):
    return lambda graph, real: graph.node("Add", [real, graph.constant(np.float32(0.5 + distance))])


def test_a_value_on_a_tie_is_refused_with_the_node():
    with pytest.raises(NotExact, match=r"node node/quantizelinear\d+: a value of its table lies 0 of a step from"):
        read_steps(graph_of(quarter, x_scale=2.0, y_scale=1.0))


@pytest.mark.parametrize("side", [-1, 1])
def test_a_value_just_nearer_to_a_tie_than_allowed_is_refused_and_just_farther_admitted(side):
    with pytest.raises(NotExact, match="from where rounding turns"):
        read_steps(graph_of(near_a_tie(0.9 * LEAST_ROOM * side), x_scale=1.0, y_scale=1.0))

    assert table_of(graph_of(near_a_tie(1.1 * LEAST_ROOM * side), x_scale=1.0, y_scale=1.0)).room >= LEAST_ROOM


REFUSED = {
    "not elementwise": (lambda graph, real: graph.node("Softmax", [real]), r"\(Softmax\): not known as a function of"),
    "chance": (lambda graph, real: graph.node("RandomNormalLike", [real]), r"\(RandomNormalLike\): not known"),
    "a vector": (
        lambda graph, real: graph.node("Mul", [real, graph.constant(np.ones(4, np.float32))]),
        r"node node/mul\d+: its constant constant\d+ is not one number",
    ),
    "not finite": (
        lambda graph, real: graph.node("Div", [graph.constant(np.float32(1)), real]),
        r"node node/quantizelinear\d+: its table holds values that are not finite",
    ),
    "not a number": (
        lambda graph, real: graph.node("Sqrt", [graph.node("Neg", [real])]),
        r"node node/quantizelinear\d+: its table holds values that are not finite",
    ),
    "nothing": (lambda _, real: real, "neither one sum, one product, nor a function of one tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_function_of_one_number_is_refused(name):
    build, message = REFUSED[name]

    with pytest.raises(NotExact, match=message):
        read_steps(graph_of(build))


@given(st.lists(st.floats(-300, 300), min_size=1, max_size=20), st.integers(0, 255))
def test_rounding_is_half_to_even_and_room_counts_turns_that_show(values, zero):
    entries, room = round_to_bytes(np.array(values), zero)

    expected = [min(255, max(0, round(Fraction(value)) + zero)) for value in values]
    assert entries.tolist() == expected
    for value in values:
        low, high = (min(255, max(0, int(end) + zero)) for end in (np.floor(value), np.ceil(value)))
        if low != high:
            assert room <= abs(value - np.floor(value) - 0.5) + 1e-12
    assert 0 <= room <= 0.5
