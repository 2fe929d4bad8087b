"""What a file fixes but leaves to be computed is computed once, and nothing else changes."""

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_support import FILTERS, SIDE, Graph
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from training.doctor.examine import examine
from training.doctor.read import read_subject
from training.folding import graph_constants
from training.foreign import settling
from training.foreign.settling import settle
from training.importing.pipeline import Order, import_model

IMAGES = np.random.default_rng(0).standard_normal((3, 3, SIDE, SIDE)).astype(np.float32)


def hush(_: str) -> None:
    """Say nothing."""


def standardised() -> onnx.ModelProto:
    """Filters that the graph itself standardises, as timm's NFNet and BiT networks have them."""
    model = Graph().model()
    nodes = [
        helper.make_node("ReduceMean", ["filters", "axes"], ["middle"]),
        helper.make_node("Sub", ["filters", "middle"], ["centred"]),
        helper.make_node("Mul", ["centred", "centred"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "axes"], ["spread"]),
        helper.make_node("Sqrt", ["spread"], ["deviation"]),
        helper.make_node("Div", ["centred", "deviation"], ["ready"]),
        *model.graph.node,
    ]
    next(node for node in nodes if node.op_type == "Conv").input[1] = "ready"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3]), "axes"))
    return model


def answers(model: onnx.ModelProto) -> np.ndarray:
    return ReferenceEvaluator(model).run(None, {"x": IMAGES})[0]


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_weights_standardised_in_the_graph_are_computed_once():
    settled = settle(standardised())
    assert kinds(settled) == kinds(Graph().model())
    assert "filters" not in {tensor.name for tensor in settled.graph.initializer}
    assert np.array_equal(answers(settled), answers(standardised()))


def test_a_network_with_standardised_weights_is_imported_and_folded(tmp_path: Path):
    onnx.save(standardised(), tmp_path / "x.onnx")
    exported = import_model(Order(tmp_path / "x.onnx", "x"), tmp_path / "models", say=hush)
    assert [record.norm for record in exported.manifest.folds] == ["norm"]


def test_a_batchnorm_over_weights_is_not_batch_statistics(tmp_path: Path):
    """As timm's ScaledStdConv2d is exported: the weights stand in for images, their own mean for running ones."""
    model = Graph().model()
    nodes = [
        helper.make_node("ReduceMean", ["filters", "axes"], ["weights_mean"], keepdims=0),
        helper.make_node("BatchNormalization", ["filters", "ones", "zeros", "weights_mean", "ones"], ["ready"]),
        *model.graph.node,
    ]
    next(node for node in nodes if node.op_type == "Conv").input[1] = "ready"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name, values in {"axes": np.array([0, 2, 3]), "ones": np.ones(3), "zeros": np.zeros(3)}.items():
        kind = np.int64 if name == "axes" else np.float32
        model.graph.initializer.append(numpy_helper.from_array(values.astype(kind), name))
    onnx.save(model, tmp_path / "x.onnx")
    assert examine(read_subject(tmp_path / "x.onnx")).errors == ()


def test_a_cast_like_another_tensor_takes_the_type_by_name():
    model = Graph().model()
    model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.float16), "half"))
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    gemm.input[0] = "twice"
    at = list(model.graph.node).index(gemm)
    model.graph.node.insert(at, helper.make_node("Mul", ["features", "two"], ["twice"]))
    model.graph.node.insert(at, helper.make_node("CastLike", ["half", "features"], ["two"]))
    wanted = answers(model)
    settled = settle(model)
    assert "CastLike" not in kinds(settled)
    assert "Cast" not in kinds(settled), "a cast of a constant is a constant"
    assert np.array_equal(answers(settled), wanted)


@pytest.mark.parametrize("kind", ["RandomNormal", "Dropout"])
def test_what_is_drawn_or_read_from_images_is_left_to_the_graph(kind: str):
    model = Graph(dropout=True).model()
    if kind == "RandomNormal":
        noise = helper.make_node("RandomNormal", [], ["noise"], shape=[1, FILTERS], dtype=TensorProto.FLOAT)
        gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
        gemm.input[0] = "noisy"
        at = list(model.graph.node).index(gemm)
        model.graph.node.insert(at, helper.make_node("Add", ["features", "noise"], ["noisy"]))
        model.graph.node.insert(at, noise)
    assert kinds(settle(model)) == kinds(model)


def test_the_model_itself_is_left_alone():
    model = standardised()
    before = model.SerializeToString()
    settle(model)
    assert model.SerializeToString() == before


def test_constants_that_nothing_can_compute_stay_in_the_graph():
    model = Graph().model()
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    model.graph.node.insert(0, helper.make_node("NoSuchOperator", ["filters"], ["ready"]))
    conv.input[1] = "ready"
    assert kinds(settle(model)) == kinds(model)


@pytest.mark.parametrize("size", [[2**14, 2**14], [2**31, 2**31]], ids=["1 GiB", "more than there is"])
@pytest.mark.parametrize("kind", ["ConstantOfShape", "Expand"])
def test_what_a_few_bytes_ask_to_be_huge_is_not_computed(kind: str, size: list[int]):
    model = Graph().model()
    inputs = ["size"] if kind == "ConstantOfShape" else ["gamma_0", "size"]
    first = numpy_helper.from_array(np.ones(1, np.float32), "gamma_0")
    model.graph.initializer.extend([first, numpy_helper.from_array(np.array(size), "size")])
    model.graph.node.insert(0, helper.make_node("ReduceMax", ["huge"], ["one"], keepdims=0))
    model.graph.node.insert(0, helper.make_node(kind, inputs, ["huge"]))
    next(node for node in model.graph.node if node.op_type == "Gemm").input.append("one")
    tracemalloc.start()
    settled = settle(model)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kinds(settled) == kinds(model)
    assert most < 2**26


def test_a_size_worked_out_from_sizes_is_told_before_it_is_computed():
    model = Graph().model()
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**15]), "side"))
    nodes = [
        helper.make_node("Concat", ["side", "side"], ["size"], axis=0),
        helper.make_node("ConstantOfShape", ["size"], ["huge"]),
        helper.make_node("ReduceMax", ["huge"], ["one"], keepdims=0),
    ]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    next(node for node in model.graph.node if node.op_type == "Gemm").input.append("one")
    assert kinds(settle(model))[:2] == ["ConstantOfShape", "ReduceMax"]


def transposed(extent: int) -> onnx.ModelProto:
    """A matrix that the graph itself transposes, and a bias that it negates."""
    model = Graph().model()
    for tensor in model.graph.initializer:
        if tensor.name == "matrix":
            tensor.CopyFrom(numpy_helper.from_array(np.ones((FILTERS, extent), np.float32), "matrix"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(extent, np.float32), "bias"))
    model.graph.node.insert(0, helper.make_node("Neg", ["bias"], ["negated"]))
    model.graph.node.insert(0, helper.make_node("Transpose", ["matrix"], ["turned"]))
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    gemm.input[1:] = ["turned", "negated"]
    return model


def test_a_weight_that_the_file_itself_stores_is_computed_however_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph_constants, "LARGEST", 2**8)
    assert kinds(settle(transposed(2**10))) == kinds(Graph().model())


def test_nothing_is_computed_where_the_copy_would_be_too_large_for_one_file(monkeypatch: pytest.MonkeyPatch):
    model = transposed(2**10)
    monkeypatch.setattr(settling, "LARGEST_BYTES", 2**14)
    assert kinds(settle(model)) == kinds(model)
