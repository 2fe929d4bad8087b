"""What has no exact form is refused by the name of its node, and what was wrong."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from conversion_graphs import FloatGraph
from conversion_support import exact_of, random_images

from training.errors import NotConvertible
from training.exact.reading import read_network

Build = Callable[[FloatGraph, str], str]
FLOAT = np.float32


def inside(middle: Build) -> onnx.ModelProto:
    """Return a network of a convolution, what is asked for on its 4 channels, and a head."""
    graph = FloatGraph()
    return graph.model(graph.head(middle(graph, graph.relu_conv(graph.start, 3, 4)), 4))


def _layer_norm(graph: FloatGraph, x: str) -> str:
    return graph.add("LayerNormalization", x, graph.constant(np.ones(8, FLOAT)))


def _instance_norm(graph: FloatGraph, x: str) -> str:
    ones = graph.constant(np.ones(4, FLOAT))
    return graph.add("InstanceNormalization", x, ones, ones)


def _made_weights(graph: FloatGraph, x: str) -> str:
    weight = graph.add("Identity", graph.constant(np.ones((4, 4, 1, 1), FLOAT)))
    return graph.add("Conv", x, graph.add("Neg", weight))


def _per_position(graph: FloatGraph, x: str) -> str:
    return graph.add("Mul", x, graph.constant(np.linspace(1, 2, 8, dtype=FLOAT).reshape(1, 1, 1, 8)))


def _square_matrix(graph: FloatGraph, x: str) -> str:
    return graph.add("MatMul", x, graph.constant(np.eye(8, dtype=FLOAT)))


def _doubled(graph: FloatGraph, x: str) -> str:
    return graph.add("Resize", x, "", graph.constant(np.array([1, 1, 2, 2], FLOAT)))


def _mirrored(graph: FloatGraph, x: str) -> str:
    return graph.add("Pad", x, graph.constant(np.array([0, 0, 1, 1] * 2)), mode="reflect")


def _with_constant(graph: FloatGraph, x: str) -> str:
    return graph.add("Concat", x, graph.constant(np.ones((1, 4, 8, 8), FLOAT)), axis=1)


def _over_channels(graph: FloatGraph, x: str) -> str:
    return graph.add("ReduceMean", x, graph.constant(np.array([1])), keepdims=1)


CASES: dict[str, tuple[Build, str]] = {
    "softmax in the middle": (lambda g, x: g.add("Softmax", x, axis=1), r"Softmax_\d+ .*no exact form"),
    "layer normalization": (_layer_norm, r"LayerNormalization_\d+ .*no exact form"),
    "instance normalization": (_instance_norm, r"InstanceNormalization_\d+ .*no exact form"),
    "resizing": (_doubled, r"Resize_\d+ .*no exact form"),
    "mirrored padding": (_mirrored, r"Pad_\d+ .*own values"),
    "a constant joined": (_with_constant, r"Concat_\d+ .*joins a constant"),
    "two tensors divided": (lambda g, x: g.add("Div", x, g.relu_conv(x, 4, 4)), r"Div_\d+ .*two tensors"),
    "two tensors subtracted": (lambda g, x: g.add("Sub", x, g.relu_conv(x, 4, 4)), r"Sub_\d+ .*two tensors"),
    "a quotient with the tensor below": (lambda g, x: g.add("Div", g.constant(np.ones((1, 4, 1, 1), FLOAT)), x),
        r"Div_\d+ .*not one number a channel"),
    "a factor for each position": (_per_position, r"Mul_\d+ .*not one number a channel"),
    "weights that are computed": (_made_weights, r"Conv_\d+ .*input 1 is not a constant"),
    "a product with matrices in space": (_square_matrix, r"MatMul_\d+ .*not a linear layer"),
    "a mean over channels": (_over_channels, r"ReduceMean_\d+ .*not over an image's positions"),
    "windows that count their padding out": (lambda g, x: g.add("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4),
        r"AveragePool_\d+ .*divide by another count"),
    "mean windows over the edge": (
        lambda g, x: g.add("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        r"AveragePool_\d+ .*reach over the edge"),
    "mean windows with holes": (lambda g, x: g.add("AveragePool", x, kernel_shape=[2, 2], dilations=[2, 2]),
        r"AveragePool_\d+ .*holes"),
    "a convolution whose padding is left to the runtime": (
        lambda g, x: g.add("Conv", x, g.constant(np.ones((4, 4, 3, 3), FLOAT)), auto_pad="SAME_UPPER"),
        r"Conv_\d+ .*not written out"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_has_no_exact_form_is_refused_by_its_nodes_name(case: str):
    build, message = CASES[case]
    with pytest.raises(NotConvertible, match=message):
        read_network(inside(build))


def _pooled(graph: FloatGraph, x: str) -> str:
    return graph.add("Flatten", graph.add("GlobalAveragePool", graph.conv(x, 4, 5)))


def _clipped(graph: FloatGraph, x: str) -> str:
    return graph.add("Relu", graph.head(x, 4))


def _normalised(graph: FloatGraph, x: str) -> str:
    return graph.add("Softmax", graph.head(x, 4), axis=1)


@pytest.mark.parametrize(
    ("end", "message"), [(_pooled, "linear layer"), (_clipped, "linear layer"), (_normalised, r"Softmax_\d+")]
)
def test_logits_that_no_linear_layer_gives_are_refused(end: Build, message: str):
    graph = FloatGraph()
    logits = end(graph, graph.relu_conv(graph.start, 3, 4))
    with pytest.raises(NotConvertible, match=message):
        read_network(graph.model(logits))


def test_a_graph_that_does_not_begin_with_pixels_channels_last_is_refused():
    model = inside(lambda _, x: x)
    model.graph.node[0].op_type = "Identity"
    del model.graph.node[0].attribute[:]
    with pytest.raises(NotConvertible, match="begins with Identity and Cast"):
        read_network(model)


def test_a_transformer_is_refused_for_its_normalization_and_not_for_how_it_begins():
    model = inside(_layer_norm)
    image, logits = model.graph.input[0].name, model.graph.output[0].name
    make = onnx.helper.make_node
    model.graph.node.insert(0, make("Shape", [image], ["batch_size"], start=0, end=1))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "rest"))
    model.graph.node.append(make("Concat", ["batch_size", "rest"], ["target"], axis=0))
    model.graph.node.append(make("Expand", [logits, "target"], ["again"]))
    model.graph.output[0].name = "again"
    with pytest.raises(NotConvertible, match=r"\(LayerNormalization\) has no exact form"):
        read_network(model)


def test_a_function_that_calibration_cannot_run_is_refused_by_its_nodes_name():
    model = inside(lambda g, x: g.add("ThresholdedRelu", x))
    with pytest.raises(NotConvertible, match=r"ThresholdedRelu_\d+"):
        exact_of(read_network(model), random_images(64, side=8))


def test_a_gate_that_is_added_elsewhere_is_refused_by_its_layer():
    def build(graph: FloatGraph, x: str) -> str:
        gate = graph.add("Sigmoid", graph.conv(x, 4, 4))
        return graph.add("Add", graph.add("Mul", x, gate), gate)

    with pytest.raises(NotConvertible, match=r"Mul_\d+.*factor of a product"):
        exact_of(read_network(inside(build)), random_images(64, side=8))
