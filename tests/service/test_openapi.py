"""The API document that is committed is the one that is served; it shows examples and every error."""

import json
from pathlib import Path

import jsonschema_rs

from service import problems

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_committed_document_is_the_served_one(ask):
    served = ask("GET", "/openapi.json").json()

    assert json.loads(COMMITTED.read_text()) == served, "run: foldserve openapi --out docs/openapi.json"


def test_each_operation_names_every_error_with_an_example_of_each_kind(ask):
    document = ask("GET", "/openapi.json").json()
    operations = [one for path in document["paths"].values() for one in path.values()]

    for operation in operations:
        assert {str(code) for code in problems.TITLE if code != 499} <= operation["responses"].keys()
        content = operation["responses"]["429"]["content"][problems.MEDIA_TYPE]
        assert content["examples"]["queue-full"]["value"]["type"] == "urn:foldserve:problem:queue-full"


def test_the_examples_fit_their_schemas(ask):
    document = ask("GET", "/openapi.json").json()
    checked = 0
    for name, schema in document["components"]["schemas"].items():
        for example in schema.get("examples", []):
            jsonschema_rs.validate({**document, "$ref": f"#/components/schemas/{name}"}, example)
            checked += 1

    assert checked >= 1
