"""A model is one file: weights that lie in another are refused, wherever in the graph they are named."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import TinyModel

from service.artifact import read_manifest
from service.errors import ArtifactError

TINY = TinyModel()


def elsewhere(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Move a tensor's content to a file of its own."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


def constant(name: str, output: str = "unused") -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.ones((2, 2), np.float32), name)
    return helper.make_node("Constant", [], [output], value=elsewhere(tensor))


def branch(output: str, weight: onnx.TensorProto | None = None) -> onnx.GraphProto:
    """Return a branch of an If whose weight is an initializer, or the value of a node."""
    node = constant("hidden", output) if weight is None else helper.make_node("Identity", [weight.name], [output])
    answer = helper.make_tensor_value_info(output, TensorProto.FLOAT, [2, 2])
    return helper.make_graph([node], output, [], [answer], [] if weight is None else [elsewhere(weight)])


def with_branches(model: onnx.ModelProto, **branches: onnx.GraphProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "chosen"))
    model.graph.node.append(helper.make_node("If", ["chosen"], ["unused"], **branches))


def in_the_graph(model):
    elsewhere(model.graph.initializer[1])


def in_a_node(model):
    model.graph.node.append(constant("hidden"))


def in_a_node_of_a_branch(model):
    with_branches(model, then_branch=branch("one"), else_branch=branch("two"))


def in_a_branch(model):
    weights = [numpy_helper.from_array(np.ones((2, 2), np.float32), name) for name in ("first", "second")]
    with_branches(model, then_branch=branch("one", weights[0]), else_branch=branch("two", weights[1]))


def without_a_name(model):
    model.graph.node.append(constant(""))  # a tensor inside a node needs none


def in_a_function(model):
    opset = helper.make_opsetid("", 20)
    model.functions.append(helper.make_function("mine", "Weight", [], ["w"], [constant("hidden", "w")], [opset]))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.graph.node.append(helper.make_node("Weight", [], ["unused"], domain="mine"))


def sparse() -> onnx.SparseTensorProto:
    values = elsewhere(numpy_helper.from_array(np.ones(2, np.float32), "sparse"))
    indices = numpy_helper.from_array(np.array([0, 3], np.int64), "indices")
    return helper.make_sparse_tensor(values, indices, [2, 2])


def sparse_in_the_graph(model):
    model.graph.sparse_initializer.append(sparse())
    model.graph.node.append(helper.make_node("Identity", ["sparse"], ["unused"]))


def sparse_in_a_node(model):
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], sparse_value=sparse()))


PLACES = [in_the_graph, in_a_node, in_a_node_of_a_branch, in_a_branch]
HIDDEN_PLACES = [without_a_name, in_a_function, sparse_in_the_graph, sparse_in_a_node]


@pytest.mark.parametrize("place", PLACES + HIDDEN_PLACES)
def test_weights_in_another_file_are_refused_wherever_the_graph_names_them(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(4096))  # there, and where ONNX Runtime would look for it
    model = TINY.onnx()
    place(model)
    model.metadata_props.add(key="foldserve", value=TINY.manifest().model_dump_json())

    with pytest.raises(ArtifactError, match=r"model\.onnx keeps its weight .*in another file"):
        read_manifest("model.onnx", model.SerializeToString())
