"""A repaired ONNX file is the file that came, but for the numbers of its running statistics."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from foreign_support import CLASSES, FILTERS, Graph
from onnx import helper
from safetensors.torch import save_file

from foldserve.cli import main
from training.doctor.read import read_subject
from training.doctor.repair import Mended, mend_graph
from training.errors import FileRefused
from training.packaging import Exported


def rest_of(model: onnx.ModelProto, *changed: str) -> bytes:
    """Return everything of a file but the numbers of the initializers named."""
    for tensor in model.graph.initializer:
        if tensor.name in changed:
            tensor.ClearField("raw_data")
    return model.SerializeToString(deterministic=True)


UPDATED = ["--momentum", "0.1", "--updates", "5"]


@pytest.mark.parametrize("element_type", [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16], ids=["float32", "float16"])
def test_nothing_of_an_onnx_file_changes_but_the_numbers_of_the_statistics(tmp_path: Path, element_type: int):
    file = Graph(element_type=element_type, values={"var": np.full(FILTERS, 1.5)}).model()
    kind = helper.tensor_dtype_to_np_dtype(element_type)
    ones = onnx.numpy_helper.from_array(np.ones((CLASSES, FILTERS), kind))
    nodes = [  # what the doctor works out before it looks
        helper.make_node("Constant", [], ["ones"], value=ones),
        helper.make_node("Mul", ["matrix", "ones"], ["same"], doc_string="by hand"),
    ]
    for node in reversed(nodes):
        file.graph.node.insert(0, node)
    next(node for node in file.graph.node if node.op_type == "Gemm").input[1] = "same"
    file.doc_string, file.producer_name = "mine", "me"
    file.metadata_props.add(key="owner", value="me")
    path, out = tmp_path / "given.onnx", tmp_path / "mended.onnx"
    onnx.save(file, path)
    assert main(["repair", str(path), "--out", str(out), *UPDATED]) == 0
    given, mended = onnx.load(path), onnx.load(out)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in mended.graph.initializer}
    assert np.abs(stored["var"] - (1.5 - 0.9**5) / (1 - 0.9**5)).max() < 2e-3
    assert rest_of(given, "mean", "var") == rest_of(mended, "mean", "var")


def test_statistics_that_another_node_reads_too_are_left_to_it(tmp_path: Path):
    file = Graph(values={"var": np.full(FILTERS, 1.5)}).model()
    norm = next(node for node in file.graph.node if node.op_type == "BatchNormalization")
    norm.input[2] = "mean"
    onnx.save(file, tmp_path / "given.onnx")
    assert main(["repair", str(tmp_path / "given.onnx"), "--out", str(tmp_path / "mended.onnx"), *UPDATED]) == 0
    mended = onnx.load(tmp_path / "mended.onnx")
    norm = next(node for node in mended.graph.node if node.op_type == "BatchNormalization")
    assert list(norm.input[1:]) == ["gamma", "mean", "normed_mended_mean", "var"]
    before, after = (
        {tensor.name: tensor.SerializeToString() for tensor in model.graph.initializer} for model in (file, mended)
    )
    assert before["mean"] == after["mean"]


def test_layers_of_one_name_get_their_own_statistics(tmp_path: Path):
    file = Graph(values={"var": np.full(FILTERS, 1.5)}).model()
    norm = next(node for node in file.graph.node if node.op_type == "BatchNormalization")
    second = helper.make_node(
        "BatchNormalization", ["normed", "gamma", "beta", "mean_2", "var_2"], ["twice"], norm.name
    )
    file.graph.node.insert(list(file.graph.node).index(norm) + 1, second)
    next(node for node in file.graph.node if node.op_type == "Relu").input[0] = "twice"
    for name, value in {"mean_2": 7.0, "var_2": 3.0}.items():
        file.graph.initializer.append(onnx.numpy_helper.from_array(np.full(FILTERS, value, np.float32), name))
    onnx.save(file, tmp_path / "given.onnx")
    assert main(["repair", str(tmp_path / "given.onnx"), "--out", str(tmp_path / "mended.onnx"), *UPDATED]) == 0
    first, second = read_subject(tmp_path / "mended.onnx").layers
    assert (first.name, second.name) == ("normed", "twice")
    share = 0.9**5
    np.testing.assert_allclose(first.running_var, (1.5 - share) / (1 - share), rtol=1e-6)
    np.testing.assert_allclose(second.running_var, (3 - share) / (1 - share), rtol=1e-6)


def test_a_layer_that_shares_its_name_with_a_node_of_another_kind_is_mended(tmp_path: Path):
    file = Graph(values={"var": np.full(FILTERS, 1.5)}).model()
    for node in file.graph.node:
        node.name = "layer1"
    onnx.save(file, tmp_path / "given.onnx")
    assert main(["repair", str(tmp_path / "given.onnx"), "--out", str(tmp_path / "mended.onnx"), *UPDATED]) == 0
    (layer,) = read_subject(tmp_path / "mended.onnx").layers
    np.testing.assert_allclose(layer.running_var, (1.5 - 0.9**5) / (1 - 0.9**5), rtol=1e-6)


def test_statistics_for_which_the_graph_has_no_node_are_refused_by_name():
    model, numbers = Graph().model(), (np.zeros(FILTERS), np.ones(FILTERS))
    before = model.SerializeToString()
    with pytest.raises(FileRefused, match="no BatchNormalization called elsewhere"):
        mend_graph(model, [Mended("norm", numbers, numbers, None), Mended("elsewhere", numbers, numbers, None)])
    assert model.SerializeToString() == before


def test_a_statistic_that_its_type_cannot_hold_is_refused(tmp_path: Path, capsys):
    file = Graph(
        element_type=onnx.TensorProto.FLOAT16, values={"mean": np.full(FILTERS, 6e4), "var": np.full(FILTERS, 1.5)}
    )
    out = tmp_path / "mended.onnx"
    assert main(["repair", str(file.write(tmp_path)), "--out", str(out), "--momentum", "0.1", "--updates", "9"]) == 1
    assert "is beyond float16" in capsys.readouterr().err
    assert not out.exists()


def test_a_model_whose_batchnorm_is_folded_away_is_not_repaired(tmp_path: Path, exported: Exported, capsys):
    source, out = exported.folder / "model.onnx", tmp_path / "out.onnx"
    assert main(["repair", str(source), "--out", str(out), "--momentum", "0.1", "--updates", "9"]) == 1
    assert "its 4 BatchNorms are folded away, statistics and all" in capsys.readouterr().err
    assert not out.exists()


def test_a_models_folder_is_told_which_file_to_name(exported: Exported, capsys):
    assert main(["inspect", str(exported.folder)]) == 2
    assert f"name a file, such as {exported.folder / 'model.onnx'}, or a run folder" in capsys.readouterr().err


def test_a_file_without_batchnorm_is_told_that_there_is_nothing_to_repair(tmp_path: Path, capsys):
    save_file({"conv.weight": torch.ones(4, 3, 3, 3)}, tmp_path / "plain.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = ["repair", str(tmp_path / "plain.safetensors"), "--out", str(out), "--momentum", "0.1"]
    assert main(arguments) == 2
    assert "holds no BatchNorm: there is nothing to repair" in capsys.readouterr().err
    assert not out.exists()
