"""Every way to mix images is refused, under the node's own name, and each is seen mixing in a run."""

import pytest
from proof_cases import mixed_axes, mixed_values
from proof_cases.graphs import Case, at_opsets, that_run, verdict
from proof_cases.oracle import refutation

from service.independence.proof import prove

CASES = mixed_axes.CASES | mixed_values.CASES
EACH = at_opsets(CASES)
RUNNING = that_run(EACH)


@pytest.mark.parametrize(("case", "opset"), EACH.values(), ids=EACH)
def test_mixing_is_refused_under_the_name_of_its_node(case: Case, opset: int) -> None:
    found = prove(case.model(opset))
    assert (found.verdict, found.node) == ("mixed", "culprit"), found
    assert found.reason.startswith(f"node culprit ({found.operator}) ")
    assert found.remedy


@pytest.mark.parametrize(("case", "opset"), RUNNING.values(), ids=RUNNING)
def test_what_is_called_mixed_is_seen_mixing(case: Case, opset: int) -> None:
    assert refutation(case.model(opset)) is not None


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("BatchNormalization in training mode", "evaluation mode"),
        ("Dropout in training mode", "evaluation mode"),
        ("DynamicQuantizeLinear", "statically"),
        ("a constant for each slot", "symbolic batch"),
        ("Softmax over the batch", "within one image"),
    ],
)
def test_a_refusal_says_what_to_do(name: str, remedy: str) -> None:
    assert remedy in prove(CASES[name].model(17)).remedy


def test_a_node_without_a_name_is_named_by_operator_and_output() -> None:
    assert verdict("y = Softmax<axis = 0>(x)").node == "Softmax y"


def test_what_no_output_reads_is_no_reason_to_refuse() -> None:
    assert verdict("unused = ReduceMean(x)  y = Relu(x)").verdict == "independent"
