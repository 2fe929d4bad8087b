"""`training.folding.graphs`: what is folded in ONNX files, what stays, and that both compute the same."""

import json

import numpy as np
import onnx
import pytest
from folding_oracle import float64, images_for, outputs, relative_error
from onnx import TensorProto, helper, numpy_helper

from benchmarks.fold_patterns import PATTERNS, Pattern
from benchmarks.fold_sketch import Sketch
from service.engine import choose_device, open_engine
from training.errors import NotFoldable
from training.folding.graphs import FoldedGraph, fold_graph

TOLERANCE = 1e-10  # relative, in float64; a wrong fold is off by 0.01 or more


def folded_and_compared(model: onnx.ModelProto) -> FoldedGraph:
    """Fold a model, and hold it against itself: algebra in float64, and the file as stored."""
    before = model.SerializeToString()
    folded = fold_graph(model)
    assert model.SerializeToString() == before, "the model itself is left alone"
    onnx.checker.check_model(folded.model, full_check=True)
    images = images_for(model)
    wanted = outputs(float64(model), images)
    assert relative_error(outputs(float64(folded.model, folded.exact), images), wanted) <= TOLERANCE
    is_half = model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert relative_error(outputs(float64(folded.model), images), wanted) <= (2e-2 if is_half else 2e-5)
    return folded


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_every_known_pattern_is_folded_where_it_is_right_and_kept_where_it_is_not(pattern: Pattern):
    model = pattern.build()
    folded = folded_and_compared(model)
    scales = {"BatchNormalization", "Mul", "Div", "Sub"}
    left = scales.intersection(kinds(folded.model))
    assert bool(left) != pattern.folds
    assert bool(folded.report.kept) != pattern.folds
    assert all(record.reason for record in folded.report.kept)
    assert all(record.error is not None and record.error <= TOLERANCE for record in folded.report.folds)


@pytest.mark.parametrize("opset", [9, 13, 18, 21, 23])
def test_every_opset_folds_and_keeps_its_version_and_metadata(opset: int):
    s = Sketch(opset=opset)
    model = s.model(s.node("Relu", s.norm(s.conv("images"))))
    model.metadata_props.add(key="author", value="somebody")
    folded = folded_and_compared(model).model
    assert folded.opset_import == model.opset_import
    assert folded.metadata_props == model.metadata_props
    assert (folded.graph.input, folded.graph.output) == (model.graph.input, model.graph.output)
    assert kinds(folded) == ["Conv", "Relu"]
    assert [node.name for node in folded.graph.node] == ["conv0", "relu2"]


def test_initializers_listed_as_inputs_by_old_files_are_folded_and_leave_no_input_behind():
    s = Sketch(opset=9)
    model = s.model(s.norm(s.conv("images", bias=False)))
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    folded = folded_and_compared(model).model
    stored = {tensor.name for tensor in folded.graph.initializer}
    assert kinds(folded) == ["Conv"]
    assert {entry.name for entry in folded.graph.input} == {"images", *stored}
    assert len(stored) == 2


def test_weights_that_a_caller_may_replace_are_not_folded():
    s = Sketch()
    model = s.model(s.norm(s.conv("images")))
    weight = model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    report = folded_and_compared(model).report
    assert report.folds == ()
    assert "not constants" in report.kept[0].reason


def test_weights_in_constant_nodes_and_behind_identities_are_folded():
    s = Sketch()
    model = s.model(s.norm(s.conv("images")))
    *first, last = model.graph.initializer
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in first]
    last_name, last.name = last.name, "stored"
    nodes.append(helper.make_node("Identity", ["stored"], [last_name]))
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.append(last)
    model.graph.node.extend(nodes)
    assert kinds(folded_and_compared(model).model) == ["Conv"]


def test_a_batchnorm_spelled_out_with_its_constants_uncomputed_is_folded():
    s = Sketch()
    x = s.conv("images")
    variance = s.node("Sqrt", s.node("Add", s.constant(s.rng.random((6, 1, 1))), s.constant(np.float64(1e-3))))
    model = s.model(s.node("Div", s.node("Sub", x, s.constant(s.rng.random((6, 1, 1)))), variance))
    assert kinds(folded_and_compared(model).model) == ["Conv"]


def test_a_value_that_a_branch_reads_is_not_changed():
    s = Sketch()
    x = s.conv("images")
    branch = helper.make_graph(
        [helper.make_node("Relu", [x], ["taken"])],
        "branch",
        [],
        [helper.make_tensor_value_info("taken", 1, ["batch", 6, 6, 6])],
    )
    condition = s.constant(np.array(True))
    chosen = s.node("If", condition, then_branch=branch, else_branch=branch)
    model = s.model(s.norm(x), chosen)
    report = folded_and_compared(model).report
    assert "used elsewhere" in report.kept[0].reason


def test_a_batchnorm_inside_a_branch_is_folded_there():
    s = Sketch()
    s.conv("images")
    s.norm("conv0_out")
    inner = [s.nodes.pop(0), s.nodes.pop(0)]
    branch = helper.make_graph(
        inner, "branch", [], [helper.make_tensor_value_info(inner[1].output[0], 1, ["batch", 6, 6, 6])]
    )
    model = s.model(s.node("If", s.constant(np.array(True)), then_branch=branch, else_branch=branch))
    folded = fold_graph(model).model
    images = images_for(model).astype(np.float32)
    assert relative_error(outputs(folded, images), outputs(model, images)) < 1e-5
    assert [node.op_type for node in folded.graph.node[0].attribute[0].g.node] == ["Conv"]
    onnx.checker.check_model(folded, full_check=True)


def test_an_output_before_the_batchnorm_stays_what_it_was():
    s = Sketch()
    x = s.conv("images")
    report = folded_and_compared(s.model(x, s.norm(x))).report
    assert "used elsewhere" in report.kept[0].reason


def test_a_shift_before_a_transposed_convolution_stays_with_the_reason_that_is_true():
    s = Sketch()
    (kept,) = fold_graph(s.model(s.conv(s.norm("images"), transposed=True))).report.kept
    assert kept.reason.endswith(
        "at the border of convtranspose1, a transposed convolution, a shift before it arrives unevenly"
    )


def test_a_weight_that_half_precision_cannot_hold_is_not_made():
    s = Sketch()
    s.constants["gamma"] = np.full(6, 6e4)
    x = s.conv("images")
    ones = s.constant(np.ones(6))
    model = s.model(
        s.node("BatchNormalization", x, "gamma", ones, s.constant(np.zeros(6)), s.constant(np.full(6, 1e-3))), half=True
    )
    assert "type ends at 65504" in fold_graph(model).report.kept[0].reason


def test_batchnorm_in_training_mode_is_refused_with_the_mend():
    s = Sketch()
    x = s.norm(s.conv("images"), training_mode=1)
    with pytest.raises(NotFoldable, match=r"batchnormalization1 is in training mode.*evaluation mode"):
        fold_graph(s.model(x))


@pytest.mark.parametrize("value, reason", [(np.nan, "not finite"), (-1.0, "negative")])
def test_impossible_statistics_are_refused_with_the_node(value: float, reason: str):
    s = Sketch()
    model = s.model(s.norm(s.conv("images")))
    variance = next(one for one in model.graph.initializer if one.name == model.graph.node[1].input[4])
    values = numpy_helper.to_array(variance).copy()
    values[2] = value
    variance.CopyFrom(numpy_helper.from_array(values, variance.name))
    with pytest.raises(NotFoldable, match=f"batchnormalization1: running_var is {reason} in channel 2"):
        fold_graph(model)


def test_statistics_that_the_graph_computes_stay_and_are_named():
    s = Sketch()
    x = s.conv("images")
    mean = s.node("ReduceMean", x, axes=[0, 2, 3], keepdims=0)
    names = [s.constant(np.ones(6)), s.constant(np.zeros(6)), mean, s.constant(np.ones(6))]
    report = fold_graph(s.model(s.node("BatchNormalization", x, *names))).report
    assert "statistics are not constants" in report.kept[0].reason


def test_a_file_older_than_opset_9_is_refused():
    with pytest.raises(NotFoldable, match="opset 8; export it again"):
        fold_graph(Sketch(opset=8).model("images"))


def test_a_batchnorm_in_a_local_function_is_folded():
    s = Sketch()
    names = [s.conv("images"), *(s.constant(s.rng.random(6) + 0.5) for _ in range(4))]
    body = helper.make_node("BatchNormalization", list("xgbmv"), ["y"])
    opset = helper.make_opsetid("", 17)
    function = helper.make_function("own", "Norm", list("xgbmv"), ["y"], [body], [opset])
    model = s.model(s.node("BatchNormalization", *names))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Norm", "own"
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    assert kinds(fold_graph(model).model) == ["Conv"]


def test_the_report_is_json_with_places_and_end_to_end_errors():
    s = Sketch()
    x = s.norm(s.node("Relu", s.norm(s.node("Identity", s.conv("images")))))
    report = fold_graph(s.model(s.conv(x, pads=[0] * 4))).report
    read = json.loads(json.dumps(report.as_json()))
    assert [(one["norm"], one["into"], one["place"], one["through"]) for one in read["folds"]] == [
        ("batchnormalization2", "conv0", "after", ["identity1"]),
        ("batchnormalization4", "conv5", "before", []),
    ]
    assert read["end_to_end"]["float64"] <= TOLERANCE < read["end_to_end"]["float32"] < 1e-5


def test_the_runtime_answers_the_same_for_the_folded_file():
    s = Sketch(3, size=(8, 8), opset=20)
    x = s.node("Cast", s.node("Transpose", "images", perm=[0, 3, 1, 2], channels=3), to=1)
    x = s.norm(s.node("MaxPool", s.norm(s.conv(x)), kernel_shape=[6, 6]), positive=True)
    model = s.model(s.gemm(s.node("Flatten", x), 6))
    entry = model.graph.input[0].type.tensor_type
    entry.elem_type = TensorProto.UINT8
    for axis, size in enumerate((8, 8, 3), start=1):
        entry.shape.dim[axis].dim_value = size
    model.graph.node[-1].output[0] = model.graph.output[0].name = "logits"
    model.graph.input[0].name = model.graph.node[0].input[0] = "image"
    folded = fold_graph(model)
    assert not folded.report.kept
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    found, wanted = (
        open_engine(one.SerializeToString(), choose_device("cpu")).run(images) for one in (folded.model, model)
    )
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
