"""The repository calls of the Open Inference Protocol: for administrators alone, and safe in what they take."""

import asyncio

import pytest
from PIL import Image
from support import Engines, TinyModel, assert_problem, encode, random_pixels, running

from service.config import Settings
from service.security import make_key, write_keys

IMAGE = encode(Image.fromarray(random_pixels(1, seed=81)[0]), "PNG")
BASE = "/v2/repository"


@pytest.fixture
def asked(tmp_path):
    """A function that sends calls, one after another, to a service with versions 1 and 2 and an admin key."""
    models = tmp_path / "models"
    for version in (1, 2):
        TinyModel(seed=version).write(models, version)
    (models / "tiny" / "serving.json").write_text('{"stable": 1}')
    key, stored = make_key("admin", "root")
    write_keys(tmp_path / "keys", [stored])

    def ask(*calls, with_key: bool = True) -> list:
        async def scenario():
            settings = Settings(models=models, device="cpu", api_keys_file=tmp_path / "keys", public_predict=True)
            async with running(settings, Engines()) as client:
                headers = {"authorization": f"Bearer {key}"} if with_key else {}
                client.headers.update(headers)
                return [await client.request(method(url), url, **options) for url, options in calls]

        return asyncio.run(asyncio.wait_for(scenario(), 60))

    return ask


def method(url: str) -> str:
    return "GET" if url.startswith(("/models", "/v2/models")) else "POST"


def load(**parameters) -> tuple[str, dict]:
    return f"{BASE}/models/tiny/load", {"json": {"parameters": parameters}}


PREDICT = ("/predict", {"content": IMAGE})
INDEX = (f"{BASE}/index", {})
UNLOAD = (f"{BASE}/models/tiny/unload", {"json": {"parameters": {"unload_dependents": False}}})


def rows(response) -> dict[str, str]:
    return {row["version"]: row["state"] for row in response.json()}


def test_the_index_shows_every_version_and_which_are_loaded(asked):
    everything, ready = asked(INDEX, (INDEX[0], {"json": {"ready": True}}))

    assert everything.json() == [
        {"name": "tiny", "version": "1", "state": "READY", "reason": ""},
        {"name": "tiny", "version": "2", "state": "UNAVAILABLE", "reason": "not loaded"},
    ]
    assert rows(ready) == {"1": "READY"}


def test_a_load_without_parameters_follows_the_folder_and_with_a_version_that_one(asked):
    _, to_two, _, after, _, back = asked(PREDICT, load(version=2), INDEX, PREDICT, (load()[0], {}), PREDICT)

    assert to_two.status_code == 200
    assert after.json()["version"] == 2
    assert back.json()["version"] == 1


def test_a_canary_and_a_shadow_can_be_set_by_a_call(asked):
    loaded, answer, shadowed, index = asked(
        load(canary=2, canary_share=1.0), PREDICT, load(shadow=2, colour="red"), INDEX
    )

    assert loaded.status_code == 200
    assert answer.json()["version"] == 2
    assert_problem(shadowed, 400, "malformed-request")
    assert rows(index) == {"1": "READY", "2": "READY"}


def test_a_call_changes_what_it_names_and_leaves_the_rest_to_the_file(asked, tmp_path):
    def plans(*calls) -> list[dict]:
        pairs = [one for call in calls for one in (call, ("/models/tiny", {}))]
        return [answer.json()["serving"] for answer in asked(*pairs)[1::2]]

    TinyModel(seed=3).write(tmp_path / "models", 3)
    wanted = {"stable": 1, "canary": 2, "canary_share": 0.25, "shadow": 3, "loaded": [1, 2, 3]}
    (tmp_path / "models" / "tiny" / "serving.json").write_text(
        '{"stable": 1, "canary": 2, "canary_share": 0.25, "shadow": 3}'
    )

    more, promoted, back = plans(load(canary_share=0.75), load(version=2, canary=None), load())

    assert more == wanted | {"canary_share": 0.75}
    assert promoted == wanted | {"stable": 2, "canary": None, "canary_share": 0.0, "loaded": [2, 3]}
    assert back == wanted


def test_a_share_without_a_canary_is_refused_with_what_to_send(asked):
    refused, _, kept = asked(load(canary_share=0.5), load(canary=2, canary_share=0.5), load(canary=2, canary_share=0))

    assert "name one as canary, or leave canary_share out" in assert_problem(refused, 409, "load-failed")["detail"]
    assert kept.status_code == 200


def test_the_protocols_metadata_name_the_versions_that_can_be_asked_for(asked):
    _, both, one = asked(load(canary=2), ("/v2/models/tiny", {}), ("/v2/models/tiny/versions/2", {}))

    assert both.json()["versions"] == ["1", "2"]
    assert one.json()["versions"] == ["2"]


def test_an_unloaded_model_answers_404_until_it_is_loaded(asked):
    statuses = [response.status_code for response in asked(UNLOAD, PREDICT, UNLOAD, load(), PREDICT)]

    assert statuses == [200, 404, 404, 200, 200]


def test_a_load_that_fails_is_a_conflict_that_says_why_and_changes_nothing(asked):
    failed, answer = asked(load(version=7), PREDICT)

    assert "version 1 is served still" in assert_problem(failed, 409, "load-failed")["detail"]
    assert answer.json()["version"] == 1


@pytest.mark.parametrize("name", ["nobody", "..", "%2e%2e", "..%2f..%2fetc", "tiny%00", "a" * 500])
def test_no_name_reaches_outside_of_the_repository(asked, name):
    (response,) = asked((f"{BASE}/models/{name}/load", {}))

    assert response.status_code == 404


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain", None])
def test_a_body_is_json_whatever_type_its_sender_gives_it(asked, content_type):
    headers = {} if content_type is None else {"content-type": content_type}
    loaded, answer = asked((load()[0], {"content": b'{"parameters": {"version": 2}}', "headers": headers}), PREDICT)

    assert loaded.status_code == 200, loaded.text
    assert answer.json()["version"] == 2


@pytest.mark.parametrize(
    ("url", "body", "words"),
    [
        (load()[0], {"parameters": {"verson": 2}}, "parameters.verson: it is not known (did you mean version?)"),
        (load()[0], {"params": {"version": 2}}, "params: it is not known (did you mean parameters?)"),
        (load()[0], {"parameters": {"canary_share": 1.5}}, "parameters.canary_share: Input should be less than"),
        (
            load()[0],
            {"parameters": {"also": None}},
            "parameters.also: null is for canary and shadow alone; [] is no other",
        ),
        (load()[0], {"parameters": {"canary_share": None}}, "parameters.canary_share: null is for canary and shadow"),
        (INDEX[0], {"reddy": True}, "reddy: it is not known (did you mean ready?); known are ready"),
        (UNLOAD[0], {"parameters": {"force": True}}, "parameters.force: it is not known; known are unload_dependents"),
    ],
)
def test_a_wrong_entry_is_named_with_those_that_are_known(asked, url, body, words):
    refused, answer = asked((url, {"json": body}), PREDICT)

    assert words in assert_problem(refused, 400, "malformed-request")["detail"]
    assert answer.json()["version"] == 1


def test_a_body_over_the_limit_is_refused(asked):
    for size in (2**16 + 1, 20 * 2**20 + 1):
        (refused,) = asked((INDEX[0], {"content": b" " * size}))
        assert_problem(refused, 413, "too-large")


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"parameters": {"config": "{}"}}', b'{"parameters": {"version": 0}}'])
def test_a_body_that_is_not_of_the_documented_form_is_refused(asked, body):
    (response,) = asked((load()[0], {"content": body, "headers": {"content-type": "application/json"}}))

    assert_problem(response, 400, "malformed-request")


@pytest.mark.parametrize("call", [INDEX, load(), UNLOAD], ids=lambda call: call[0])
def test_without_an_admin_key_nothing_can_be_seen_or_changed(asked, call):
    refused, answer = asked(call, PREDICT, with_key=False)

    assert_problem(refused, 401, "not-authenticated")
    assert answer.json()["version"] == 1
