"""Schemathesis asks a real server everything that the API document allows, and much that it does not."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

pytestmark = pytest.mark.e2e

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
DEADLINE = "X-Request-Timeout-Ms"
DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"  # another test compares it with the served one


@schemathesis.serializer("image/*")
def as_it_is(_, value):
    return value if isinstance(value, bytes) else str(value).encode()


OPERATIONS = [found.ok() for found in schemathesis.openapi.from_path(DOCUMENT).get_all_operations()]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_each_answer_is_one_that_the_document_describes(server, operation, mode):
    @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case):
        if mode.name == "POSITIVE":  # a model that is there, or no request would get past its name
            served = {"name": "tiny", "version": "1"}
            case.path_parameters = {name: served[name] for name in case.path_parameters or {}}
        if str((case.headers or {}).get(DEADLINE, "")).strip().isdecimal():
            del case.headers[DEADLINE]  # 504 is the right answer to a deadline of a few milliseconds
        case.call_and_validate(base_url=server.url, checks=CHECKS)

    if mode.name == "POSITIVE" or operation.body or operation.query or operation.path_parameters:
        ask()
