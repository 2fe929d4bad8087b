"""Where the rules do not reach, the answer is unproven, with reason and mend, and never a traceback."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from proof_cases.graphs import graph, verdict

from service.independence.proof.rules import RULES, sizes, slots
from service.independence.proof.verdict import OPSETS, prove

FIXED = {
    "a Reshape to one image": ("[bad] y = Reshape(x, t)", "int64[2] t = {1, 64}"),
    "a Reshape that takes the batch for 1": ("[bad] y = Reshape(x, t)", "int64[2] t = {1, -1}"),
    "a Squeeze of the batch": ("[bad] y = Squeeze(x, t)", "int64[1] t = {0}"),
    "an Expand to four images": ("[bad] y = Expand(x, t)", "int64[4] t = {4, 4, 4, 4}"),
    "a Resize to one image": ("[bad] y = Resize(x, , , t)", "int64[4] t = {1, 4, 8, 8}"),
}


@pytest.mark.parametrize(("body", "constants"), FIXED.values(), ids=FIXED)
@pytest.mark.parametrize("images", ["float[1,4,4,4] x", "float[N,4,4,4] x"])
def test_a_batch_size_baked_into_a_node_is_unproven_and_asks_for_a_symbolic_one(
    body: str, constants: str, images: str
) -> None:
    found = verdict(body, constants=constants, images=images)
    assert (found.verdict, found.node) == ("unproven", "bad")
    assert "symbolic batch" in found.remedy


def test_the_reason_says_where_the_batch_size_is_fixed() -> None:
    found = verdict("[flatten] y = Reshape(x, t)", constants="int64[2] t = {1, 64}", images="float[1,4,4,4] x")
    assert found.reason == "node flatten (Reshape) has the batch size fixed in its target shape [1, 64]"


def test_an_operator_without_a_rule_is_unproven_by_name() -> None:
    found = verdict("[odd] y = MaxUnpool<kernel_shape = [2, 2]>(x, x)")
    assert (found.verdict, found.node, found.operator) == ("unproven", "odd", "MaxUnpool")
    assert found.reason == "node odd (MaxUnpool) cannot be followed: no rule for op MaxUnpool"


def test_an_operator_of_an_unknown_domain_is_unproven_even_on_constants() -> None:
    found = verdict("[odd] a = local.Mystery(c)  y = Mul(x, a)", constants="float c = {1}")
    assert (found.verdict, found.node) == ("unproven", "odd")


@pytest.mark.parametrize("table", [RULES, sizes.RULES, slots.RULES], ids=["images", "sizes", "slots"])
def test_every_rule_is_for_an_operator_that_exists(table: dict[tuple[str, str], object]) -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    newer = {"CumProd"}  # in ONNX's standard since opset 26
    assert {name for domain, name in table if domain == ""} <= known | newer
    assert {domain for domain, _ in table} <= {"", "com.microsoft"}


@pytest.mark.parametrize("opset", [8, 24])
def test_opsets_outside_the_rules_are_unproven(opset: int) -> None:
    found = verdict("y = Relu(x)", opset=opset)
    assert found.verdict == "unproven"
    assert str(opset) in found.reason


def test_a_function_of_another_opset_is_unproven() -> None:
    function = '<opset_import: ["": 24], domain: "local"> later (a) => (b) { b = Relu(a) }'
    found = verdict("y = local.later(x)", functions=function)
    assert found.verdict == "unproven"
    assert "24" in found.reason


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_of_the_rules_is_accepted(opset: int) -> None:
    assert verdict("y = Relu(x)", opset=opset).verdict == "independent"


def test_two_inputs_are_refused() -> None:
    found = verdict("y = Add(x, z)", images="float[N,4,4,4] x, float[N,4,4,4] z")
    assert found.verdict == "unproven"
    assert "2: x, z" in found.reason


def test_an_input_with_an_initial_value_counts_as_a_constant() -> None:
    body, images = "y = Add(x, c)", "float[N,4,4,4] x, float[1] c"
    assert verdict(body, images=images, constants="float[1] c = {1}").verdict == "independent"


def test_an_input_of_unknown_rank_is_refused() -> None:
    model = graph("y = Relu(x)")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert prove(model).verdict == "unproven"


def test_two_axes_of_one_name_are_refused() -> None:
    found = verdict("y = Transpose<perm = [1, 0, 2, 3]>(x)", images="float[N,N,4,4] x")
    assert found.verdict == "unproven"


def test_an_output_without_images_is_refused() -> None:
    found = verdict("[constant] y = Relu(c)", constants="float[2] c = {1, 2}")
    assert (found.verdict, found.node) == ("unproven", "constant")


def test_an_output_with_several_rows_an_image_is_refused() -> None:
    found = verdict("[fold] y = Reshape(x, t)", constants="int64[2] t = {-1, 16}")
    assert (found.verdict, found.node) == ("unproven", "fold")


def test_every_output_is_checked() -> None:
    found = verdict("y = Relu(x)  [all] z = ReduceMean(x)", output="float y, float z")
    assert (found.verdict, found.node) == ("mixed", "all")


def test_a_file_that_redefines_a_standard_operator_is_not_believed() -> None:
    body, imports = [helper.make_node("Softmax", ["a"], ["b"], axis=0)], [helper.make_opsetid("", 17)]
    function = helper.make_function("", "Relu", ["a"], ["b"], body, imports)
    model = graph("[fake] y = Relu(x)")
    model.functions.append(function)
    found = prove(model)
    assert (found.verdict, found.node) == ("unproven", "fake")


def test_a_name_computed_twice_is_not_believed() -> None:
    assert verdict("y = Relu(x)  y = Softmax<axis = 0>(x)").verdict != "independent"


def test_a_name_that_nothing_computes_is_unproven() -> None:
    found = verdict("[lost] y = Add(x, z)")
    assert (found.verdict, found.node) == ("unproven", "lost")


def test_functions_that_call_themselves_end() -> None:
    model = graph(
        "y = local.again(x)",
        functions="""<opset_import: ["": 17, "local": 1], domain: "local">
                     again (a) => (b) { b = local.again(a) }""",
    )
    assert prove(model).verdict == "unproven"


def test_functions_that_double_are_not_followed_for_ever() -> None:
    levels = "".join(
        f'<opset_import: ["": 17, "local": 1], domain: "local"> f{i} (a) => (c) '
        f"{{ b = local.f{i + 1}(a)  c = local.f{i + 1}(b) }}\n"
        for i in range(40)
    )
    last = '<opset_import: ["": 17], domain: "local"> f40 (a) => (c) { c = Relu(a) }'
    assert prove(graph("y = local.f0(x)", functions=levels + last)).verdict == "unproven"


def test_a_huge_constant_costs_nothing() -> None:
    body = "c = ConstantOfShape(k)  s = Shape(c)  n = ReduceProd(s)  [bad] y = Reshape(x, n)"
    assert verdict(body, constants="int64[3] k = {100000, 100000, 100000}").verdict == "unproven"


def test_weights_that_are_not_in_the_file_are_not_missed() -> None:
    model = graph("y = Conv(x, w)", constants="float[2, 4, 1, 1] w = {1, 2, 3, 4, 5, 6, 7, 8}")
    weights = model.graph.initializer[0]
    weights.ClearField("float_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="elsewhere")
    assert prove(model).verdict == "independent"


def test_a_damaged_initializer_gives_a_verdict_and_not_a_traceback() -> None:
    model = graph("y = Add(x, c)", constants="float[4] c = {1, 2, 3, 4}")
    model.graph.initializer[0].ClearField("float_data")
    model.graph.initializer[0].raw_data = b"short"
    found = prove(model)
    assert found.verdict == "unproven"
    assert "damaged" in found.reason


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_node_gives_a_verdict_and_not_a_traceback(data: st.DataObject) -> None:
    body = """s = Shape(x)  n = Gather(s, zero)  u = Unsqueeze(n, v)  t = Concat<axis = 0>(u, rest)
              r = Reshape(x, t)  a, b = Split<axis = 1>(r)
              c = Concat<axis = 1>(a, b)  y = Softmax<axis = 1>(c)"""
    model = graph(body, constants="int64 zero = {0}, int64[1] v = {0}, int64[1] rest = {-1}")
    node = data.draw(st.sampled_from(list(model.graph.node)))
    damage = data.draw(st.sampled_from(["operator", "input", "no inputs", "axis", "output"]))
    if damage == "operator":
        node.op_type = data.draw(st.sampled_from(["Gather", "Gemm", "If", "Loop", "Slice", "Pad", "Einsum", "TopK"]))
    elif damage == "input":
        node.input[0] = data.draw(st.sampled_from(["x", "s", "t", "rest", "", "nobody"]))
    elif damage == "no inputs":
        del node.input[:]
    elif damage == "axis":
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("axis", data.draw(st.sampled_from([-9, 7, "a", [1, 2], 0.5]))))
    else:
        del node.output[:]
    assert prove(model).verdict in ("independent", "mixed", "unproven")


def test_a_large_initializer_keeps_its_shape() -> None:
    weights = np.zeros((4, 2000), np.float32)
    model = graph("f = GlobalAveragePool(x)  g = Flatten(f)  y = MatMul(g, w)")
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    assert prove(model).verdict == "independent"
