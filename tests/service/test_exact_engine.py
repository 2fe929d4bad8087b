"""Which execution of an exact model runs, and that it goes on to the next where kernels prove wrong."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from exact_recipes import Recipe, make
from exact_service import Kernels
from exact_support import bits
from support import CPU

from service.engine import Device, open_engine
from service.exact_engine import ExactEngine, executions_for
from service.exact_tables import VALUES, wrong_tables
from service.processor import describe_processor, saturates_signed_products

GRAPH = make(Recipe(seed=2, blocks=("conv", "table", "residual", "table"), images=8))
PLAIN = make(Recipe(seed=2, blocks=("conv",), images=8))
ALL = ("integer", "unsigned", "twin")


def engine_of(kernels: Kernels, graph=GRAPH, executions=ALL) -> ExactEngine:
    return ExactEngine(graph.model().SerializeToString(), CPU, kernels, executions)


def test_it_begins_with_the_first_execution_and_ends_with_the_last():
    engine = engine_of(Kernels(), PLAIN)
    seen = []
    for _ in ALL:
        seen.append((engine.execution, engine.describe()["execution"]))
        assert bits(engine.run(PLAIN.images)) == bits(PLAIN.values["logits"])
        went_on = engine.fall_back()

    assert seen == [(one, one) for one in ALL]
    assert went_on is False
    assert engine.execution == "twin"
    assert bits(engine.run(PLAIN.images)) == bits(PLAIN.values["logits"]), "the last one goes on"


def test_an_execution_whose_runtime_computes_another_function_is_passed_over(caplog):
    kernels = Kernels(lambda kind, *_: kind == "table")
    engine = engine_of(kernels)

    assert engine.execution == "twin", "it looks functions up"
    assert kernels.opened[-1] == "twin"
    assert not {"integer", "unsigned"} & set(kernels.opened), "neither was ever opened"
    assert "execution integer is passed over: here node/quantizelinear" in caplog.text
    assert bits(engine.run(GRAPH.images)) == bits(GRAPH.values["logits"])


def test_this_runtime_computes_the_functions_as_the_file_says():
    assert wrong_tables(GRAPH.model(), lambda content: open_engine(content, CPU)) == []
    assert engine_of(Kernels()).execution == "integer"


def test_a_function_that_errs_at_one_value_in_one_vector_lane_is_named():
    class Lane:
        def __init__(self, content):
            self.real = open_engine(content, CPU)

        def run(self, values, threads=1):
            made = self.real.run(values)
            made[(np.arange(len(values)) % 16 == 5) & (values == 200)] ^= 1
            return made

    wrong = wrong_tables(GRAPH.model(), Lane)

    assert len(wrong) == 2
    assert all(name.startswith("node/quantizelinear") for name in wrong)


def test_every_value_meets_every_place_of_a_vector():
    seen = np.arange(VALUES) % 257 % 256
    met = {(int(value), place % 64) for place, value in enumerate(seen)}

    assert len(met) == 256 * 64


def test_where_only_one_execution_is_left_there_is_no_other_to_pass_to():
    assert engine_of(Kernels(lambda kind, *_: kind == "table"), executions=("integer",)).execution == "integer"


def test_runs_go_on_from_other_threads_while_it_falls_back():
    engine = engine_of(Kernels(), PLAIN)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(engine.run, PLAIN.images) for _ in range(40)]
        assert engine.fall_back()
        assert engine.fall_back()
        runs += [pool.submit(engine.run, PLAIN.images) for _ in range(40)]

    assert all(bits(one.result()) == bits(PLAIN.values["logits"]) for one in runs)


def test_threads_cut_no_sum_so_no_convolution_is_excluded():
    assert engine_of(Kernels(), executions=("twin",)).plain_convolutions() == ()


def test_cuda_runs_the_twin_and_a_processor_without_vnni_no_signed_weights():
    cpu = executions_for(CPU)

    assert executions_for(Device("cuda", "cuda")) == ("twin",)
    assert cpu == (("unsigned", "twin") if saturates_signed_products() else ALL)


@pytest.mark.parametrize(
    "facts, saturates",
    [
        ({"machine": "x86_64", "flags": ["avx2", "fma"]}, True),
        ({"machine": "x86_64", "flags": ["avx2", "avx512f", "avx512bw"]}, True),
        ({"machine": "x86_64", "flags": ["avx2", "avx512f", "avx512_vnni"]}, False),
        ({"machine": "x86_64", "flags": ["avx2", "avx_vnni"]}, False),
        ({"machine": "x86_64"}, True),
        ({"machine": "AMD64"}, True),
        ({"machine": "aarch64", "flags": ["asimd"]}, False),
    ],
)
def test_x86_without_vnni_saturates_sums_of_two_products(facts, saturates):
    assert saturates_signed_products(facts) is saturates


def test_vnni_is_among_the_flags_that_describe_a_processor():
    facts = describe_processor()

    assert saturates_signed_products() == saturates_signed_products(facts)
