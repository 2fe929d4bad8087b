"""What documents show is what readers get: links lead somewhere, and shown calls give the answers shown under them."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
SHOWN_CALL = re.compile(r"^\$ (curl .*localhost:8000.*)\n(.*)$", re.MULTILINE)


def shown_calls() -> Iterator[tuple[str, str]]:
    """Give (command, the answer shown under it) for the calls that need the committed model alone."""
    readme, tour = (ROOT / name for name in ("README.md", "docs/tour.md"))
    for text in (readme.read_text(), tour.read_text().partition("\n## Train")[0]):
        yield from SHOWN_CALL.findall(text)


def test_each_threat_points_to_tests_that_exist():
    rows = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ")][1:]
    file = ""
    for row in rows:
        pointers = re.findall(r"`((?:tests/[\w/]+\.py)?(?:::\w+)?)`", row)
        assert pointers, row
        for pointer in pointers:
            named, _, test = pointer.partition("::")
            file = named or file
            assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"


def nearly(shown: object) -> object:
    """Return `shown` with its fractions loosened: NumPy's exponentials differ in the last bits between processors."""
    if isinstance(shown, dict):
        return {key: nearly(value) for key, value in shown.items()}
    if isinstance(shown, list):
        return [nearly(value) for value in shown]
    return pytest.approx(shown, rel=1e-9) if isinstance(shown, float) else shown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_each_link_between_documents_leads_to_a_file(document):
    missing = [link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()]

    assert missing == []


def test_each_call_that_the_documents_show_gives_the_answer_that_they_show(start):
    server = start("--models", str(ROOT / "models"), "--form", "exact")  # else each machine takes its faster form
    calls = list(shown_calls())

    assert len(calls) >= 5
    for command, shown in calls:
        line = command.replace("http://localhost:8000", server.url).replace("curl ", "curl -sS ", 1)
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, check=True)
        answer = json.loads(done.stdout)
        assert answer == nearly(json.loads(shown)), command
