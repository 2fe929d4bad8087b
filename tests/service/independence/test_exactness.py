"""The bounds of the proof: what it admits, to the last integer, and that beyond it float32 does round."""

import numpy as np
import pytest
from exact_recipes import Recipe, make
from exact_support import LIMIT, Graph, bits, run, worst_sum
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from service.errors import NotExact
from service.executions import float_twin
from service.independence.exactness import prove_exact, reference_logits
from service.independence.exactness.proof import partial_sums
from service.integers import read_steps

FILTERS = 3


def convolution(*, beyond: int = 0, x_zero: int = 0, factor=0.37, pixels=None) -> Graph:
    """One 1×1 convolution whose channel 1 can reach 2^24 − 1 + `beyond`."""
    graph = Graph(np.full((2, 4, 4, 2), 255, np.uint8) if pixels is None else pixels)
    weight = np.array([[3, -5], [127, 127], [-7, 2]], np.int8).reshape(FILTERS, 2, 1, 1)
    bias = np.array([9, LIMIT - 1 + beyond - worst_sum(weight, x_zero)[1], -4])
    x = graph.conv(graph.planes(), weight, bias, np.full(FILTERS, factor), x_zero=x_zero)
    graph.head(x, np.ones((16 * FILTERS, 2)), [0, 0], 1.0)
    return graph


def dense_head(*, beyond: int = 0) -> Graph:
    graph = Graph(np.zeros((2, 4, 4, 2), np.uint8))
    weight = np.ones((32, 2), np.int8)
    graph.head(graph.planes(), weight, [0, LIMIT - 1 + beyond - 255 * 32], 1.0)
    return graph


def pair(scales=(1.0, 1.0, 1.0), zeros=(0, 0, 0), operator="Add") -> Graph:
    graph = Graph(np.zeros((2, 4, 4, 2), np.uint8))
    x = graph.planes()
    y = graph.clip(x, 0, 200)
    graph.head(graph.pair(operator, x, y, scales, zeros), np.ones((32, 2)), [0, 0], 1.0)
    return graph


def proof_of(graph: Graph):
    return prove_exact(read_steps(graph.model()))


@pytest.mark.parametrize("x_zero", [0, 1, 128, 255])
def test_the_last_integer_is_admitted_and_the_next_refused_with_node_and_channel(x_zero):
    assert proof_of(convolution(x_zero=x_zero)).tightest.bound == LIMIT - 1

    with pytest.raises(NotExact, match=r"node node/qlinearconv\d+: output channel 1 can reach 16,777,216"):
        proof_of(convolution(x_zero=x_zero, beyond=1))


def test_the_head_has_the_same_bound():
    assert proof_of(dense_head()).tightest.bound == LIMIT - 1

    with pytest.raises(NotExact, match=r"node node/matmulinteger\d+: output channel 1 can reach 16,777,216"):
        proof_of(dense_head(beyond=1))


def test_one_beyond_the_bound_float32_does_round():
    graph = convolution(beyond=2, factor=1.0)  # 2^24 + 1 is no float32
    sums = 255 * 254 + int(read_steps(graph.model()).steps[1].bias[1])
    assert sums == LIMIT + 1

    with pytest.raises(NotExact):
        proof_of(graph)
    assert float_sum(graph) == LIMIT != sums


def float_sum(graph: Graph) -> int:
    """Return what the twin's convolution makes of white pixels at channel 1, of 16 positions each."""
    twin = float_twin(graph.model())
    (conv,) = (node for node in twin.graph.node if node.op_type == "Conv")
    twin.graph.node.append(helper.make_node("Flatten", [conv.output[0]], ["seen"]))
    del twin.graph.output[:]
    twin.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.FLOAT, None))
    return int(run(twin, graph.images)[0, 16])


def test_a_model_beyond_the_bound_differs_between_integers_and_floats():
    """A sum that needs 26 bits, in steps of 1, where the factor brings its last bits into the answer."""
    pixels = np.random.default_rng(2).integers(0, 256, (16, 4, 4, 64), dtype=np.uint8)
    graph = Graph(pixels)
    weight = np.random.default_rng(3).integers(-127, 128, (40, 64, 1, 1)).astype(np.int8)
    x = graph.conv(graph.planes(), weight, np.full(40, 2**26), np.full(40, 100 / 2**26), y_zero=3)
    wide = np.random.default_rng(4).integers(100, 128, (640, 3)).astype(np.int8)
    graph.head(x, wide, [2**26 + 1, 2**26 + 3, 2**26 + 5], 0.3)
    model = graph.model()

    with pytest.raises(NotExact, match="can reach"):
        proof_of(graph)
    assert bits(reference_logits(read_steps(model), pixels)) == bits(graph.values["logits"]), "float64 holds them"
    assert bits(run(float_twin(model), pixels)) != bits(graph.values["logits"]), "float32 does not"


@given(st.integers(0, 255), st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_no_order_of_terms_has_a_larger_partial_sum_than_the_bound_and_one_reaches_it(x_zero, seed, terms):
    random = np.random.default_rng(seed)
    weight = random.integers(-127, 128, (1, terms)).astype(np.int8)
    bias = random.integers(-5000, 5000, 1).astype(np.int32)
    (bound,) = partial_sums(weight, bias, x_zero)
    ends = np.array([255 - x_zero, -x_zero])
    products = weight[0].astype(np.int64) * random.choice(ends, terms)
    parts = random.permutation(np.append(products, bias))
    reached = max(
        abs(int(bias[0])) + int(np.maximum(weight[0] * end, weight[0] * other).clip(0).sum())
        for end, other in (ends, ends[::-1])
    )

    assert np.abs(parts.cumsum()).max() <= bound
    assert reached <= bound
    assert bound == int(worst_sum(weight, x_zero)[0]) + abs(int(bias[0]))


REFUSED = {
    "a scale that is no power of two": (lambda: pair((1.0, 1.5, 1.0)), r"the scale 1\.5 of clip\d+ is no usable power"),
    "a scale beyond float32's middle": (lambda: pair((2.0**41, 1.0, 1.0)), "is no usable power of two"),
    "an odd zero point": (lambda: pair(zeros=(0, 127, 0)), r"the zero point 127 of clip\d+ is odd"),
    "an odd zero point of the result": (lambda: pair(zeros=(0, 0, 1)), "the zero point 1 of quantizelinear"),
    "operands far apart": (lambda: pair((1.0, 2.0**15, 1.0)), "25 bits are needed"),
    "a product out of reach": (lambda: pair((1.0, 1.0, 2.0**-7), operator="Mul"), "25 bits are needed"),
    "a factor of zero": (lambda: convolution(factor=0.0), "its factors are not all finite and at least 2"),
    "a negative factor": (lambda: convolution(factor=-1.0), "its factors are not all finite and at least 2"),
    "a factor near subnormal numbers": (lambda: convolution(factor=2.0**-101), "its factors are not all finite"),
    "a factor that is not finite": (lambda: convolution(factor=np.inf), "its factors are not all finite"),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the oracle's, at factors of no use
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_rounded_once_is_refused_with_the_node(name):
    build, message = REFUSED[name]

    with pytest.raises(NotExact, match=message) as refused:
        proof_of(build())
    assert str(refused.value).startswith("node node/")


@pytest.mark.parametrize(
    "graph", [pair((1.0, 2.0**14, 1.0)), pair((1.0, 1.0, 2.0**-6), operator="Mul"), pair((2.0**38, 2.0**39, 2.0**38))]
)
def test_just_inside_is_admitted(graph):
    proof_of(graph)


def test_a_head_s_scale_near_subnormal_numbers_is_refused():
    graph = Graph(np.zeros((1, 4, 4, 1), np.uint8))
    graph.head(graph.planes(), np.ones((16, 2)), [0, 0], 2.0**-110)

    with pytest.raises(NotExact, match="its factors are not all finite and at least 2"):
        proof_of(graph)


def test_the_proof_lists_every_layer_with_its_terms_and_headroom():
    proved = proof_of(make(Recipe(blocks=("depthwise", "strided"), at_the_brim=False, channels=1)))

    assert [layer.terms for layer in proved.layers] == [9, 9, 72, 8 * 16]
    assert all(layer.headroom_bits == pytest.approx(24 - np.log2(layer.bound)) for layer in proved.layers)
    assert proved.tightest.headroom_bits == min(layer.headroom_bits for layer in proved.layers)
