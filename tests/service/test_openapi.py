"""The API document that is committed is the one that is served; it shows examples and every error."""

import asyncio
import json
import threading
from pathlib import Path

import httpx
import jsonschema_rs
from support import Engines

from service import problems
from service.app import create_app
from service.config import Settings

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


def test_the_document_is_built_once_and_never_on_the_event_loop(models):
    app = create_app(Settings(models=models, device="cpu"), open_engine=Engines())
    build, builders = app.openapi, []

    def building() -> dict:
        if app.openapi_schema is None:
            builders.append(threading.current_thread())
        return build()

    app.openapi = building  # FastAPI's own way to another document

    async def scenario() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            calls = [("GET", "/openapi.json"), ("GET", "/models/x?versoin=1"), ("GET", "/predict"), ("GET", "/nowhere")]
            return list(await asyncio.gather(*(client.request(*call) for call in calls)))

    document, wrong, method, nowhere = asyncio.run(scenario())

    assert [one.status_code for one in (document, wrong, method, nowhere)] == [200, 400, 405, 404]
    assert "did you mean version?" in wrong.json()["detail"]
    assert len(builders) == 1
    assert builders[0] is not threading.main_thread()
