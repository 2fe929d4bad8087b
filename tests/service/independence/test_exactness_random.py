"""Random exact models: every execution, level, number of threads and batch gives the bits of an int64 oracle."""

from dataclasses import replace

import numpy as np
import pytest
from exact_recipes import BLOCKS, Recipe, make
from exact_support import FUNCTIONS, LEVELS, Graph, bits, run, session
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from service.errors import NotExact
from service.executions import EXECUTIONS, execute_as
from service.independence.exactness import prove_exact, reference_logits
from service.integers import read_steps

RECIPES = st.builds(
    Recipe,
    seed=st.integers(0, 2**32 - 1),
    channels=st.sampled_from([1, 3]),
    blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4).map(tuple),
    is_signed=st.booleans(),
    at_the_brim=st.booleans(),
    function=st.sampled_from(sorted(FUNCTIONS)),
)
EXTREME = Recipe(seed=3, channels=3, blocks=("residual", "table", "excite", "concat", "max"))


@given(RECIPES, st.integers(1, 4), st.integers(0, 4), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_every_execution_gives_the_oracle_s_bits_at_every_level_in_any_batch(recipe, threads, start, size):
    graph = make(recipe)
    model, images, wanted = graph.model(), graph.images, graph.values["logits"]
    part = np.arange(start, start + size) % len(images)

    for execution in EXECUTIONS:
        executed = execute_as(model, execution)
        for level in LEVELS:
            runtime = session(executed, level, threads)
            (whole,) = runtime.run(None, {"image": images})
            (some,) = runtime.run(None, {"image": images[part]})
            assert bits(whole) == bits(wanted), (execution, level)
            assert bits(some) == bits(wanted[part]), (execution, level, "another batch")


@given(RECIPES)
@settings(max_examples=60, deadline=None)
def test_the_reference_gives_the_oracle_s_bits_and_the_proof_holds(recipe):
    graph = make(recipe)
    steps = read_steps(graph.model())

    assert bits(reference_logits(steps, graph.images)) == bits(graph.values["logits"])
    assert bits(reference_logits(steps, graph.images, chunk=2)) == bits(graph.values["logits"])
    proved = prove_exact(steps)
    assert all(0 < layer.bound < 2**24 for layer in proved.layers)
    if recipe.at_the_brim:
        assert proved.tightest.bound == 2**24 - 1
        assert 0 < proved.tightest.headroom_bits < 1e-6


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_large_batches_and_every_number_of_threads_give_the_same_bits(execution, threads):
    graph = make(replace(EXTREME, images=33, side=9))

    assert bits(run(execute_as(graph.model(), execution), graph.images, threads=threads)) == bits(
        graph.values["logits"]
    )


def onto_a_tie() -> tuple[int, np.float32]:
    """Return a sum and a factor whose product lies beside k + ½ and is rounded onto it by float32 alone."""
    random = np.random.default_rng(0)
    while True:
        total, factor = int(random.integers(2**20, 2**23)), np.float32(random.integers(50, 100) + 0.5)
        factor /= np.float32(total)
        product, once = float(factor) * total, np.float32(total) * factor
        if once % 1 == 0.5 and np.rint(product) != np.rint(once):
            return total, factor


def test_the_product_behind_a_sum_is_rounded_to_float32_before_it_is_rounded_to_a_byte():
    total, factor = onto_a_tie()
    graph = Graph(np.zeros((2, 4, 4, 1), np.uint8))
    x = graph.conv(graph.planes(), np.ones((2, 1, 1, 1)), [total, total], [factor, factor])
    graph.head(x, np.ones((32, 2)), [0, 0], 1.0)
    model = graph.model()

    assert graph.values[x].flat[0] != np.rint(float(factor) * total)
    assert bits(reference_logits(read_steps(model), graph.images)) == bits(graph.values["logits"])
    for execution in EXECUTIONS:
        assert bits(run(execute_as(model, execution), graph.images)) == bits(graph.values["logits"])


def two_inputs(scales, zeros, operator) -> Graph:
    """Two channels of pixels, added or multiplied, every byte of the result in the logits."""
    graph = Graph(np.random.default_rng(5).integers(0, 256, (24, 8, 8, 2), dtype=np.uint8))
    x, parts = graph.planes(), ["part0", "part1"]
    sizes = graph.constant(np.ones(2, np.int64))
    graph.nodes.append(helper.make_node("Split", [x, sizes], parts, name="split", axis=1))
    for index, part in enumerate(parts):
        graph.holds(part, graph.values[x][:, index : index + 1])
    graph.head(graph.pair(operator, *parts, scales, zeros), np.stack([np.arange(64), np.ones(64)], 1), [0, 0], 0.37)
    return graph


POWERS = st.integers(-14, 14).map(lambda power: 2.0**power)
EVEN = st.integers(0, 127).map(lambda half: 2 * half)


@given(st.tuples(POWERS, POWERS, POWERS), st.tuples(EVEN, EVEN, EVEN), st.sampled_from(["Add", "Mul"]))
@settings(max_examples=150, deadline=None)
def test_whatever_pair_the_proof_admits_runtimes_compute_alike(scales, zeros, operator):
    graph = two_inputs(scales, zeros, operator)
    model = graph.model()
    steps = read_steps(model)
    assert bits(reference_logits(steps, graph.images)) == bits(graph.values["logits"])
    try:
        prove_exact(steps)
    except NotExact:
        return
    for execution in ("integer", "twin"):
        for level in ("off", "all"):
            assert bits(run(execute_as(model, execution), graph.images, level)) == bits(graph.values["logits"])


@pytest.mark.parametrize(
    "scales, zeros",
    [((2.0**5, 2.0**-6, 2.0**12), (90, 220, 168)), ((2.0**12, 2.0**12, 2.0**-6), (224, 90, 106))],
    ids=["the result's step is coarse", "the result's step is fine"],
)
def test_a_sum_that_needs_more_bits_with_its_zero_point_is_refused_and_a_runtime_does_get_it_wrong(scales, zeros):
    graph = two_inputs(scales, zeros, "Add")

    with pytest.raises(NotExact, match=r"its scales lie so far apart that 28 bits are needed"):
        prove_exact(read_steps(graph.model()))
    assert bits(run(graph.model(), graph.images)) != bits(graph.values["logits"])
