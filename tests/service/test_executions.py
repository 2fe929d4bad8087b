"""The executions of an exact model: the same integers, and what in them keeps an optimizer from undoing that."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from exact_recipes import Recipe, make
from exact_support import LEVELS, Graph, bits, run, session
from onnx import TensorProto, numpy_helper

from service.errors import NotExact
from service.executions import EXECUTIONS, execute_as, float_twin, unsigned
from service.integers import read_steps

RECIPE = Recipe(seed=11, channels=3, blocks=("residual", "strided", "table", "excite"), images=16, side=9)
ROUGH = Recipe(seed=1, channels=3, blocks=("conv", "conv", "conv"), images=64, side=12)
ALONE = [level for level in LEVELS if level != "off"]


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def optimized(model: onnx.ModelProto, level: str, folder) -> list[str]:
    """Return the operators that the runtime really runs."""
    session(model, level, optimized=folder / "optimized.onnx")
    return operators(onnx.load(folder / "optimized.onnx"))


def without_first_round(twin: onnx.ModelProto) -> onnx.ModelProto:
    """Take out each Round between a sum and the Mul by its factor, which changes no number."""
    bare = onnx.ModelProto()
    bare.CopyFrom(twin)
    del bare.graph.node[:]
    dropped = {node.output[0]: node.input[0] for node in twin.graph.node if node.output[0].endswith("/whole")}
    assert dropped
    for node in twin.graph.node:
        if node.output[0] not in dropped:
            kept = bare.graph.node.add()
            kept.CopyFrom(node)
            for place, name in enumerate(node.input):
                kept.input[place] = dropped.get(name, name)
    return bare


@pytest.mark.parametrize("level", ALONE)
def test_the_optimized_twin_still_multiplies_behind_the_sum(level, tmp_path):
    twin = float_twin(make(ROUGH).model())

    assert operators(twin).count("Mul") == 5, "four convolutions and the head"
    assert optimized(twin, level, tmp_path).count("Mul") == 5


@pytest.mark.parametrize("level", ALONE)
def test_without_the_first_round_the_factor_goes_into_the_weights_and_bits_change(level, tmp_path):
    graph = make(ROUGH)
    bare = without_first_round(float_twin(graph.model()))

    assert bits(run(bare, graph.images, "off")) == bits(graph.values["logits"]), "as written it is the same function"
    assert optimized(bare, level, tmp_path).count("Mul") == 1, "the head's alone"
    assert not np.array_equal(run(bare, graph.images, level), graph.values["logits"])


def test_factors_that_are_powers_of_two_would_hide_it():
    graph = Graph(np.random.default_rng(1).integers(0, 256, (64, 12, 12, 3), dtype=np.uint8))
    weight = np.random.default_rng(2).integers(-127, 128, (8, 3, 3, 3))
    x = graph.conv(graph.planes(), weight, np.zeros(8), np.full(8, 2.0**-9), y_zero=100)
    graph.head(x, np.random.default_rng(3).integers(-20, 20, (800, 3)), [0, 0, 0], 0.1)

    assert bits(run(without_first_round(float_twin(graph.model())), graph.images)) == bits(graph.values["logits"])


def test_the_integer_execution_is_the_file_itself():
    model = make(RECIPE).model()

    assert execute_as(model, "integer").SerializeToString() == model.SerializeToString()


def test_unsigned_moves_every_weight_up_by_128_and_nothing_else():
    model = make(RECIPE).model()
    moved = unsigned(model)
    before, after = ({one.name: one for one in each.graph.initializer} for each in (model, moved))
    signed = {name for name, one in before.items() if one.data_type == TensorProto.INT8}

    for name in before:
        first, second = (numpy_helper.to_array(each[name]) for each in (before, after))
        expected = (first.astype(np.int64) + 128).astype(np.uint8) if name in signed else first
        assert second.dtype == expected.dtype
        assert np.array_equal(second, expected)
    assert {name for name in signed if before[name].dims == []}, "zero points too"
    assert operators(moved) == operators(model)


def test_the_twin_uses_standard_operators_and_holds_integers_as_float32():
    twin = float_twin(make(RECIPE).model())

    onnx.checker.check_model(twin, full_check=True)
    assert {node.domain for node in twin.graph.node} == {""}
    assert not {"QLinearConv", "MatMulInteger", "QuantizeLinear", "DequantizeLinear"} & set(operators(twin))
    assert not any(one.data_type in {TensorProto.INT8, TensorProto.UINT8} for one in twin.graph.initializer)
    assert (twin.graph.input[0].name, twin.graph.output[0].name) == ("image", "logits")


def test_the_twin_keeps_what_the_file_says_of_itself():
    model = make(RECIPE).model()
    model.metadata_props.add(key="foldserve", value="{}")

    assert [(one.key, one.value) for one in float_twin(model).metadata_props] == [("foldserve", "{}")]


def test_the_model_given_is_left_as_it_was():
    model = make(RECIPE).model()
    before = model.SerializeToString(deterministic=True)
    for execution in EXECUTIONS:
        execute_as(model, execution)

    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_pixels_may_be_read_twice(execution):
    graph = Graph(np.random.default_rng(4).integers(0, 256, (9, 5, 5, 3), dtype=np.uint8))
    first, again = graph.planes(), graph.planes()
    graph.head(graph.concat(first, graph.clip(again, 9, 99)), np.tile([[3, -2], [-1, 7]], (75, 1)), [5, -5], 0.3)

    assert bits(run(execute_as(graph.model(), execution), graph.images)) == bits(graph.values["logits"])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_pixels_may_be_read_as_they_lie(execution):
    graph = Graph(np.random.default_rng(4).integers(0, 256, (9, 5, 5, 3), dtype=np.uint8))
    graph.head(graph.clip("image", 9, 99), np.tile([[3, -2]], (75, 1)), [5, -5], 0.3, x_zero=7)

    assert bits(run(execute_as(graph.model(), execution), graph.images)) == bits(graph.values["logits"])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_table_between_two_grids_is_the_same_in_every_execution(execution):
    graph = make(replace(RECIPE, blocks=("table", "table"), function="hardswish"))

    assert bits(run(execute_as(graph.model(), execution), graph.images)) == bits(graph.values["logits"])


def test_the_twin_of_a_file_outside_the_grammar_is_refused():
    graph = make(RECIPE)
    model = graph.model()
    model.graph.node[0].op_type = "Shrink"

    with pytest.raises(NotExact):
        float_twin(model)


def test_a_head_whose_weights_have_no_written_zero_point_is_refused():
    """Unsigned weights would need one, and be another function without it."""
    model = make(replace(RECIPE, weight_zero=False)).model()

    with pytest.raises(NotExact, match=r"node node/matmulinteger\d+ \(MatMulInteger\): its input 3 \(absent\)"):
        read_steps(model)
