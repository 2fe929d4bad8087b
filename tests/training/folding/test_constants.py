"""What a graph computes from its own constants is known, up to a size that the file's weights explain."""

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from benchmarks.fold_sketch import Sketch
from training.folding import graph_constants
from training.folding.evaluation import evaluate
from training.folding.graph_constants import COMPUTED, Constants
from training.folding.graphs import fold_graph, fold_unmeasured

MOST = 2**26  # bytes that the refusals below may take, a quarter of what they are allowed to compute


def model(nodes: list[NodeProto], **constants: np.ndarray) -> ModelProto:
    stored = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "constants", [], [], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def doubled(times: int) -> list[NodeProto]:
    return [helper.make_node("Concat", [f"c{one}"] * 2, [f"c{one + 1}"], axis=0) for one in range(times)]


HUGE = {
    "Expand": (
        "y",
        model([helper.make_node("Expand", ["c", "size"], ["y"])], c=np.ones(1), size=np.array([2**17] * 2)),
    ),
    "more than there is": (
        "y",
        model([helper.make_node("Expand", ["c", "size"], ["y"])], c=np.ones(1), size=np.array([2**31, 2**31])),
    ),
    "Add": (
        "y",
        model([helper.make_node("Add", ["row", "column"], ["y"])], row=np.ones((1, 2**13)), column=np.ones((2**13, 1))),
    ),
    "Concat": ("c40", model(doubled(40), c0=np.ones(2**4))),
}


@pytest.mark.parametrize("case", HUGE)
def test_what_a_few_bytes_ask_to_be_huge_is_no_constant(case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph_constants, "LARGEST", 2**24)
    name, file = HUGE[case]
    tracemalloc.start()
    found = Constants.of(file).array(name)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found is None
    assert most < MOST


def test_what_is_computed_counts_in_all_and_not_each_for_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph_constants, "LARGEST", 2**16)
    nodes = [helper.make_node("Expand", ["c", "size"], [f"y{one}"]) for one in range(4)]
    known = Constants.of(model(nodes, c=np.ones(1), size=np.array([2**12])))  # 2¹⁵ bytes each
    assert [known.array(f"y{one}") is None for one in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("is_node", [False, True], ids=["initializer", "Constant node"])
def test_a_weight_explains_what_is_computed_of_it_wherever_it_is_stored(monkeypatch: pytest.MonkeyPatch, is_node: bool):
    monkeypatch.setattr(graph_constants, "LARGEST", 2**10)
    weight = np.ones((64, 64), np.float32)
    transpose = helper.make_node("Transpose", ["w"], ["y"])
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight))
    file = model([constant, transpose]) if is_node else model([transpose], w=weight)
    assert Constants.of(file).array("y") is not None


SMALL = {
    "Identity": (["c"], {}), "Cast": (["c"], {"to": 11}), "Shape": (["c"], {}), "Reshape": (["c", "shape"], {}),
    "Squeeze": (["c", "axes"], {}), "Unsqueeze": (["c", "axes"], {}), "Transpose": (["c"], {}), "Flatten": (["c"], {}),
    "Concat": (["c", "c"], {"axis": 1}), "Expand": (["c", "sizes"], {}), "Sqrt": (["c"], {}), "Reciprocal": (["c"], {}),
    "Neg": (["c"], {}), "Pow": (["c", "c"], {}), "Add": (["c", "c"], {}), "Sub": (["c", "c"], {}),
    "Mul": (["c", "c"], {}), "Div": (["c", "c"], {}),
}  # fmt: skip


def test_every_operator_that_is_computed_is_computed_where_it_is_small():
    assert set(SMALL) == COMPUTED - {"CastLike"}, "CastLike has no type of its own"
    constants = {"c": np.full((1, 3), 2.0), "shape": np.array([3, 1]), "axes": np.array([0]), "sizes": np.array([4, 3])}
    for kind, (inputs, attributes) in SMALL.items():
        file = model([helper.make_node(kind, inputs, ["y"], **attributes)], **constants)
        wanted = ReferenceEvaluator(_with_output(file)).run(None, {})[0]
        np.testing.assert_array_equal(Constants.of(file).array("y"), wanted)


def _with_output(file: ModelProto) -> ModelProto:
    file.graph.output.append(helper.make_empty_tensor_value_info("y"))
    return file


def test_a_chain_of_constants_longer_than_the_stack_is_worked_out():
    nodes = [helper.make_node("Neg", [f"c{one}"], [f"c{one + 1}"]) for one in range(2000)]
    assert Constants.of(model(nodes, c0=np.ones(1))).array("c2000").tolist() == [1.0]


@pytest.mark.parametrize(("steps", "is_folded"), [(90, True), (3000, False)])
def test_a_batchnorm_behind_more_steps_than_the_stack_takes_stays_and_says_why(steps: int, is_folded: bool):
    s = Sketch()
    x = s.conv("images")
    for _ in range(steps):
        x = s.node("Identity", x)
    report = fold_unmeasured(s.model(s.norm(x))).report
    assert (len(report.folds), len(report.kept)) == (int(is_folded), int(not is_folded))
    assert all("more than 100 steps lie between" in record.reason for record in report.kept)


def test_nothing_is_run_where_nothing_was_folded():
    s = Sketch()
    folded = fold_graph(s.model(s.node("Relu", s.conv("images"))), {"no such input": np.zeros(1)})
    assert folded.report.end_to_end is None


def test_shapes_are_told_past_weights_that_are_too_large_to_be_shapes():
    s = Sketch(64)
    x = s.node("Flatten", s.node("GlobalAveragePool", s.conv("images", 64)))
    x = s.node("MatMul", x, s.constant(s.rng.standard_normal((64, 40))), channels=40)
    assert fold_unmeasured(s.model(s.norm(x))).report.kept == ()


def _gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def _gelu_by_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize(
    ("kind", "attributes", "wanted"),
    [("Erf", {}, math.erf), ("Gelu", {}, _gelu), ("Gelu", {"approximate": "tanh"}, _gelu_by_tanh)],
)
def test_erf_and_gelu_are_as_exact_as_their_type(kind: str, attributes, wanted: Callable[[float], float], dtype):
    """ONNX's own reference gives them float32 at most."""
    values = np.linspace(-4, 4, 101).astype(dtype)
    node = helper.make_node(kind, ["x"], ["y"], **attributes)
    kind_of = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    ends = [[helper.make_tensor_value_info(name, kind_of, [101])] for name in ("x", "y")]
    file = helper.make_model(helper.make_graph([node], "one", *ends), opset_imports=[helper.make_opsetid("", 20)])
    found = evaluate(file, {"x": values})["y"]
    assert found.dtype == dtype
    # values up to 4, and for negative ones 1 + erf cancels
    np.testing.assert_allclose(
        found.astype(float), [wanted(float(x)) for x in values], rtol=0, atol=8 * float(np.finfo(dtype).eps)
    )
