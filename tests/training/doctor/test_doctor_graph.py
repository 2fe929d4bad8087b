"""`training.doctor` on ONNX graphs, hand-made and by both exporters of torch: broken ones, and healthy ones."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_support import FILTERS, Graph, network, torch_export
from onnx import TensorProto, helper

from benchmarks.fold_sketch import Sketch
from service.artifact import MANIFEST_KEY
from training.doctor.examine import inspect
from training.doctor.read import onnx_subject
from training.packaging import Exported

HEALTHY = {"unfolded"}  # a BatchNorm behind a convolution is what these graphs are about


def checks(path: Path) -> set[str]:
    return {finding.check for finding in inspect(path).findings}


def test_a_healthy_graph_is_only_told_to_be_folded(tmp_path: Path):
    report = inspect(Graph().write(tmp_path))
    assert {finding.check for finding in report.findings} == HEALTHY
    assert report.errors == ()


BREAKAGES = {
    "training-mode": Graph(training_mode=True),
    "bias-before": Graph(conv_bias=True),
    "dropout-before": Graph(dropout=True),
    "fixed-batch": Graph(batch=1),
    "eps": Graph(epsilon=1e-12),
    "not-finite": Graph(values={"matrix": np.full((4, FILTERS), np.nan)}),
    "negative-variance": Graph(values={"var": -np.ones(FILTERS)}),
    "never-updated": Graph(values={"mean": np.zeros(FILTERS), "var": np.ones(FILTERS)}),
    "initial-statistics": Graph(values={"mean": np.full(FILTERS, 0.01), "var": np.linspace(0.95, 1.05, FILTERS)}),
    "overflow": Graph(values={"matrix": np.full((4, FILTERS), 1e6)}),
    "half-statistics": Graph(element_type=TensorProto.FLOAT16),
    "opset": Graph(opset=24),
}


@pytest.mark.parametrize("check", BREAKAGES)
def test_each_check_finds_the_broken_graph(tmp_path: Path, check: str):
    found = checks(BREAKAGES[check].write(tmp_path)) - HEALTHY
    assert found == {check}


def test_batch_statistics_in_the_graph_are_found_by_the_proof(tmp_path: Path):
    model = Graph().model()
    norm = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    norm.input[3] = "batch_mean"
    at = list(model.graph.node).index(norm)
    nodes = [
        helper.make_node("ReduceMean", ["convolved", "axes"], ["batch_mean"], keepdims=0),
        *list(model.graph.node)[at:],
    ]
    del model.graph.node[at:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 2, 3]), "axes"))
    onnx.save(model, tmp_path / "batch.onnx")
    report = inspect(tmp_path / "batch.onnx")
    assert [finding.check for finding in report.errors] == ["batch-statistics"]


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "script"])
def test_a_torch_export_with_running_statistics_has_no_error(tmp_path: Path, dynamo: bool):
    path = torch_export(network(), tmp_path / "torch.onnx", dynamo=dynamo)
    report = inspect(path)
    assert (report.layers, report.errors) == (2, ())
    # without its optimizer the new exporter writes operators that no rule of the proof is for
    assert checks(path) - {"unproven"} == HEALTHY


def test_a_torch_export_without_running_statistics_is_found(tmp_path: Path):
    path = torch_export(network(track=False), tmp_path / "torch.onnx", dynamo=True)
    assert {finding.check for finding in inspect(path).errors} == {"batch-statistics"}


def test_a_torch_export_in_training_mode_is_found(tmp_path: Path):
    path = torch_export(network(), tmp_path / "torch.onnx", dynamo=False, training=True)
    assert {finding.check for finding in inspect(path).errors} == {"training-mode"}


def test_a_dropout_in_training_mode_is_found(tmp_path: Path):
    model = Graph(dropout=True).model()
    node = next(node for node in model.graph.node if node.op_type == "Dropout")
    node.input.extend(["", "drops"])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "drops"))
    onnx.save(model, tmp_path / "drops.onnx")
    found = {finding.check: finding.severity for finding in inspect(tmp_path / "drops.onnx").findings}
    assert found["active-dropout"] == "warning"


def test_unfolded_names_what_folding_would_take_away_and_nothing_else(tmp_path: Path):
    s = Sketch(3)
    pooled = s.norm(s.node("AveragePool", s.conv("images"), kernel_shape=[2, 2]))  # folds past the pooling
    kept = s.norm(s.node("Sigmoid", pooled))  # nothing can take this one in
    before = s.norm(s.node("Sigmoid", kept))  # goes into the convolution behind it
    onnx.save(s.model(s.conv(before)), tmp_path / "three.onnx")
    (finding,) = [one for one in inspect(tmp_path / "three.onnx").findings if one.check == "unfolded"]
    assert finding.where == ("batchnormalization2", "batchnormalization6")


def test_two_batchnorms_with_one_set_of_statistics_are_named(tmp_path: Path):
    model = Graph().model()
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    again = helper.make_node("BatchNormalization", ["normed", "gamma", "beta", "mean", "var"], ["twice"], name="again")
    relu.input[0] = "twice"
    model.graph.node.insert(list(model.graph.node).index(relu), again)
    onnx.save(model, tmp_path / "shared.onnx")
    (finding,) = [one for one in inspect(tmp_path / "shared.onnx").findings if one.check == "shared-statistics"]
    assert finding.where == ("again", "norm")


def test_a_file_that_counts_no_batches_says_how_much_of_the_start_may_be_left(tmp_path: Path):
    least = Graph(values={"var": np.linspace(0.7, 3, FILTERS)}).write(tmp_path)
    (note,) = inspect(least).notes
    assert note.startswith("ONNX counts no batches: up to 70% of the initial statistics may be left")
    assert inspect(Graph(values={"var": np.linspace(0.05, 3, FILTERS)}).write(tmp_path)).notes == ()


def test_a_statistic_that_is_not_finite_is_one_finding(tmp_path: Path):
    report = inspect(Graph(values={"mean": np.full(FILTERS, np.nan)}).write(tmp_path))
    assert [finding.where for finding in report.errors] == [("norm",)]


def test_a_file_of_foldserves_own_says_what_was_folded(exported: Exported):
    report = inspect(exported.folder / "model.onnx")
    assert report.layers == len(exported.manifest.batchnorm)
    assert report.folded == len(exported.manifest.folds)
    assert report.errors == ()
    assert report.kind == "artifact"


def with_layers_that_stay(exported: Exported, counts: list[int]) -> onnx.ModelProto:
    """Return the artifact as though its first layers had not been folded, each after so many batches."""
    model = onnx.load(exported.folder / "model.onnx")
    manifest = exported.manifest
    stay = {record.norm: count for record, count in zip(manifest.batchnorm, counts, strict=False)}
    told = {
        "folds": tuple(record for record in manifest.folds if record.norm not in stay),
        "batchnorm": tuple(
            record.model_copy(update={"num_batches_tracked": stay.get(record.norm, record.num_batches_tracked)})
            for record in manifest.batchnorm
        ),
    }
    entry = next(one for one in model.metadata_props if one.key == MANIFEST_KEY)
    entry.value = manifest.model_copy(update=told).model_dump_json()
    sizes = {"g": 1.5, "b": 0.5, "m": 0.25, "v": 0.75}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.full(2, value, np.float32), name) for name, value in sizes.items()
    )
    for index in range(len(counts)):
        model.graph.node.append(helper.make_node("BatchNormalization", ["x", *sizes], [f"y{index}"], f"node_{index}"))
    return model


def test_a_layer_that_stays_under_the_exporters_name_is_counted_once_with_what_the_manifest_tells(exported: Exported):
    layers = onnx_subject(exported.folder, with_layers_that_stay(exported, [77])).layers
    assert sorted(layer.name for layer in layers) == sorted(
        ["node_0", *(one.norm for one in exported.manifest.batchnorm[1:])]
    )
    assert layers[0].num_batches_tracked == 77


def test_layers_that_stay_are_told_nothing_that_may_be_another_ones(exported: Exported):
    """The manifest has them in the order of definition, a graph in that of use."""
    layers = onnx_subject(exported.folder, with_layers_that_stay(exported, [900, 5000])).layers
    assert len(layers) == len(exported.manifest.batchnorm)
    assert [layer.num_batches_tracked for layer in layers[:2]] == [None, None]


def test_an_operator_without_a_rule_is_named_beside_a_foreign_opset(tmp_path: Path):
    model = Graph(opset=24).model()
    del model.graph.node[-1].output[:]
    model.graph.node[-1].output.append("mixed")
    model.graph.node.append(helper.make_node("Swish", ["mixed"], ["scores"], name="new", domain="", alpha=1.0))
    path = tmp_path / "new.onnx"
    onnx.save(model, path)
    named = {finding.check: finding.where for finding in inspect(path).findings}
    assert (named["opset"], named["unproven"]) == ((), ("new",))
