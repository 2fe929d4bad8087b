"""The grammar of exact models: what is read from a sound file, and each refusal, with the node's name."""

import numpy as np
import onnx
import pytest
from exact_recipes import Recipe, make
from exact_support import Graph
from onnx import TensorProto, helper, numpy_helper

from service.errors import NotExact
from service.integers import Convolution, Head, Move, Pair, Table, read_steps


def small() -> Graph:
    """Move, convolution, sum, table and head."""
    graph = Graph(np.zeros((1, 4, 4, 2), np.uint8))
    x = graph.conv(graph.planes(), np.ones((2, 2, 1, 1)), [1, 2], [0.37, 0.21], x_zero=4, y_zero=6)
    x = graph.pair("Add", x, graph.max_pool(x, 3, 1, 1), (1.0, 2.0, 0.5), (6, 6, 8))
    x = graph.table("sigmoid", x, 0.05, 8, 2.0**-8, 0)
    graph.head(x, np.ones((32, 2)), [3, 4], 0.25)
    return graph


def the(model: onnx.ModelProto, operator: str, place: int = 0) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == operator][place]


def put(model: onnx.ModelProto, name: str, value) -> None:
    """Replace a constant."""
    (tensor,) = (one for one in model.graph.initializer if one.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def give(model: onnx.ModelProto, node: onnx.NodeProto, position: int, value) -> None:
    """Give a node a constant of its own."""
    name = f"given{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    node.input.extend([""] * (position + 1 - len(node.input)))
    node.input[position] = name


def state(node: onnx.NodeProto, **attributes) -> None:
    for name, value in attributes.items():
        for one in [one for one in node.attribute if one.name == name]:
            node.attribute.remove(one)
        node.attribute.append(helper.make_attribute(name, value))


def constants(operator: str, position: int, value, place: int = 0):
    return lambda model: give(model, the(model, operator, place), position, value)


def attributes(operator: str, **given):
    return lambda model: state(the(model, operator), **given)


def no_bias(model):
    del the(model, "QLinearConv").input[8:]


def second_input(model):
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.UINT8, ["batch"]))


def second_output(model):
    model.graph.output.append(helper.make_tensor_value_info("sigmoid", TensorProto.FLOAT, None))


def another_opset(model):
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def a_function(model):
    model.functions.add().name = "mine"


def a_domain(model):
    the(model, "QLinearConv").domain = "com.microsoft"


def computed_factor(model):
    the(model, "QLinearConv").input[4] = "image"


def float_input(model):
    the(model, "QLinearConv").input[0] = the(model, "Add").output[0]


def float_into_concat(model):
    the(model, "MaxPool").op_type = "Concat"
    pool = the(model, "Concat")
    del pool.attribute[:]
    pool.input.append("elsewhere")
    state(pool, axis=1)


def loose_node(model):
    model.graph.node.append(helper.make_node("Relu", ["logits"], ["loose"], name="loose"))


def no_head(model):
    for _ in range(4):
        model.graph.node.pop()


def no_nodes(model):
    del model.graph.node[:]


def shared_real(model):
    """Use a dequantized tensor twice, in two islands."""
    dequantized = the(model, "DequantizeLinear", 2).output[0]
    quantize = the(model, "QuantizeLinear", 1)
    inputs = [dequantized, *quantize.input[1:]]
    model.graph.node.insert(len(model.graph.node) - 5, helper.make_node("QuantizeLinear", inputs, ["q"], name="again"))


def three_operands(model):
    add = the(model, "Add")
    add.op_type = "Sum"


def no_add(model):
    cast = the(model, "Cast")
    cast.input[0] = the(model, "MatMulInteger").output[0]


def another_cast(model):
    state(the(model, "Cast"), to=TensorProto.FLOAT16)


def narrow_bias(model):
    give(model, the(model, "Add", 1), 1, np.zeros(1, np.int32))


def indices(model):
    the(model, "MaxPool").output.append("indices")


REFUSED = {
    "two inputs": (second_input, "one input and one output"),
    "two outputs": (second_output, "one input and one output"),
    "another operator set": (another_opset, "the standard ONNX operators alone"),
    "a function": (a_function, "the standard ONNX operators alone"),
    "a domain": (a_domain, r"node node/qlinearconv\d+ \(QLinearConv\): it belongs to the domain com.microsoft"),
    "input scale": (constants("QLinearConv", 1, np.float32(2)), "are not 1, so that it rounds twice"),
    "output scale": (constants("QLinearConv", 6, np.float32(0.5)), "are not 1, so that it rounds twice"),
    "weight zero": (constants("QLinearConv", 5, np.int8(1)), "its weights have a zero point"),
    "unsigned weight": (constants("QLinearConv", 3, np.ones((2, 2, 1, 1), np.uint8)), "is uint8, expected int8"),
    "double factor": (constants("QLinearConv", 4, np.ones(2)), "is float64, expected float32"),
    "one factor": (constants("QLinearConv", 4, np.ones(1, np.float32)), "not one for each of 2 output channels"),
    "bias of another length": (constants("QLinearConv", 8, np.ones(3, np.int32)), "not one for each of 2 output"),
    "signed zero point": (constants("QLinearConv", 2, np.int8(4)), "is int8, expected uint8"),
    "two zero points": (constants("QLinearConv", 2, np.zeros(2, np.uint8)), "a tensor has one zero point, not 2"),
    "computed factor": (computed_factor, r"its input 4 \(image\) is not a stored constant"),
    "floats into a convolution": (float_input, r"its input add\d+ is not one of bytes"),
    "automatic padding": (attributes("QLinearConv", auto_pad="SAME_UPPER"), "its padding is not written out"),
    "automatic padding of a pool": (attributes("MaxPool", auto_pad="SAME_UPPER"), "not written out as a constant"),
    "ceil mode": (attributes("MaxPool", ceil_mode=1), "ceil_mode and indices are not in the grammar"),
    "indices": (indices, "ceil_mode and indices are not in the grammar"),
    "a move of something else": (float_into_concat, "its input elsewhere is not one of bytes"),
    "scale of zero": (constants("DequantizeLinear", 1, np.float32(0)), "is not one positive scale"),
    "scale that is not finite": (constants("DequantizeLinear", 1, np.float32(np.nan)), "is not one positive scale"),
    "scales per channel": (constants("DequantizeLinear", 1, np.ones(2, np.float32)), "is not one positive scale"),
    "a sum of another kind": (three_operands, "neither one sum, one product, nor a function of one tensor"),
    "a shared real tensor": (
        shared_real,
        r"node again \(QuantizeLinear\): it rounds dequantizelinear\d+, which is shar",
    ),
    "a loose node": (loose_node, r"node loose \(Relu\): it is not part of any exact step"),
    "no head": (no_head, "it is not part of any exact step"),
    "no nodes": (no_nodes, "the graph: it is not part of any exact step"),
    "no bias in the head": (no_add, r"node node/cast\d+ \(Cast\): expected Add before it"),
    "sums in half precision": (another_cast, "the sums become float32, nothing else"),
    "weight zero in the head": (constants("MatMulInteger", 3, np.int8(1)), "its weights have a zero point"),
    "a bias for one class": (narrow_bias, r"expected weights \(C, K\) and a bias \(K,\)"),
    "a negative scale of the head": (constants("Mul", 1, np.float32(-1)), "is not one positive scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_in_the_grammar_is_refused_with_its_node(name):
    spoil, message = REFUSED[name]
    model = small().model()
    read_steps(model)
    spoil(model)

    with pytest.raises(NotExact, match=message) as refused:
        read_steps(model)
    whole = ("an exact model", "the graph")
    assert str(refused.value).startswith("node ") or str(refused.value).startswith(whole)


def test_the_steps_are_what_the_file_says():
    graph = small()
    steps = read_steps(graph.model())
    move, convolution, pool, pair, table, flat, head = steps.steps

    assert [type(step) for step in steps.steps] == [Move, Convolution, Move, Pair, Table, Move, Head]
    assert (steps.image, steps.logits) == ("image", "logits")
    assert [one.node.op_type for one in (move, pool, flat)] == ["Transpose", "MaxPool", "Flatten"]
    assert (convolution.x_zero, convolution.y_zero, convolution.groups, convolution.pads) == (4, 6, 1, (0, 0, 0, 0))
    assert convolution.factor.tolist() == np.float32([0.37, 0.21]).tolist()
    assert convolution.bias.tolist() == [1, 2]
    assert (pair.operation, pair.a.scale, pair.b.scale, pair.y.scale) == ("Add", 1.0, 2.0, 0.5)
    assert (pair.a.tensor, pair.b.tensor, pair.y.zero) == (convolution.y, pool.outputs[0], 8)
    assert [node.op_type for node in table.nodes] == ["DequantizeLinear", "Sigmoid", "QuantizeLinear"]
    assert (head.weight.shape, head.bias.tolist(), head.scale) == ((32, 2), [3, 4], np.float32(0.25))
    assert list(steps.products()) == [convolution, head]
    assert list(steps.tables()) == [table]


def test_a_convolution_without_a_bias_has_one_of_zeros():
    model = small().model()
    no_bias(model)

    (convolution,) = (step for step in read_steps(model).steps if isinstance(step, Convolution))
    assert convolution.bias.tolist() == [0, 0]


def test_operands_keep_the_order_that_the_file_gives_them():
    model = small().model()
    add = the(model, "Add")
    add.input[0], add.input[1] = add.input[1], add.input[0]

    (pair,) = (step for step in read_steps(model).steps if isinstance(step, Pair))
    assert (pair.a.scale, pair.b.scale) == (2.0, 1.0)


def test_a_node_without_a_name_is_told_by_its_output():
    model = make(Recipe()).model()
    convolution = the(model, "QLinearConv")
    convolution.name = ""
    state(convolution, auto_pad="VALID")

    with pytest.raises(NotExact, match=f"^node {convolution.output[0]} "):
        read_steps(model)
