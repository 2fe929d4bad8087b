"""What keeps images apart is proved, in the forms of each opset, and no run refutes it."""

import pytest
from proof_cases import kept_apart, rarer_forms
from proof_cases.graphs import Case, at_opsets, that_run
from proof_cases.oracle import refutation

from service.independence.proof import prove

EACH = at_opsets(kept_apart.CASES | rarer_forms.CASES)
RUNNING = that_run(EACH)


@pytest.mark.parametrize(("case", "opset"), EACH.values(), ids=EACH)
def test_images_kept_apart_are_proved_so(case: Case, opset: int) -> None:
    found = prove(case.model(opset))
    assert found.verdict == "independent", found
    assert found.nodes_seen > 0


@pytest.mark.parametrize(("case", "opset"), RUNNING.values(), ids=RUNNING)
def test_no_run_refutes_these_proofs(case: Case, opset: int) -> None:
    assert refutation(case.model(opset)) is None
