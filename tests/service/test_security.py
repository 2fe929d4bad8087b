"""API keys: hashed at rest, two roles, changed without a restart, and asked for before anything else happens."""

import asyncio
import os
from pathlib import Path

import pytest
import yaml
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import Engines, assert_problem, encode, predict_scope, random_pixels, running

from service.app import create_app
from service.config import Settings
from service.errors import ConfigurationError, NotAuthenticated, NotPermitted
from service.routes.access import require_admin
from service.security import KeyRing, make_key, parse_keys, read_keys, write_keys

ROOT = Path(__file__).parents[2]
IMAGE = encode(Image.fromarray(random_pixels(1)[0]), "PNG")


@pytest.fixture
def keys(tmp_path):
    """A keys file and its keys in the clear, by name."""
    made = {name: make_key(role, name) for name, role in (("ann", "predict"), ("bob", "predict"), ("root", "admin"))}
    path = tmp_path / "keys"
    write_keys(path, [stored for _, stored in made.values()])
    return path, {name: key for name, (key, _) in made.items()}


def ask_each(models, path, requests, **options):
    """Return the answers of an app with this keys file; it has an admin call too."""

    async def scenario():
        settings = Settings(models=models, device="cpu", mode="off", api_keys_file=path, **options)
        async with running(settings, Engines()) as client:
            app: FastAPI = client._transport.app
            app.post("/admin", dependencies=[require_admin])(lambda: "done")
            return [await client.request(method, url, **rest) for method, url, rest in requests]

    return asyncio.run(scenario())


def test_a_key_in_the_clear_is_nowhere_in_the_file_and_no_two_lines_share_a_salt(keys):
    path, clear = keys

    assert not any(key in path.read_text() for key in clear.values())
    assert len({one.salt for one in read_keys(path)}) == len(clear)
    assert path.stat().st_mode & 0o077 == 0


def test_each_key_opens_its_own_line_alone(keys):
    path, clear = keys

    for one in read_keys(path):
        assert [name for name, key in clear.items() if one.opens(key)] == [one.name]


@given(st.text(max_size=80))
def test_no_other_text_opens_a_key(text):
    _, stored = make_key("predict", "ann")

    assert not stored.opens(text)


@given(st.text(max_size=200))
def test_any_text_is_keys_or_a_refusal_that_does_not_repeat_it(text):
    try:
        parse_keys(text, "keys")
    except ConfigurationError as error:
        assert "expected role:name:salt:sha256" in str(error)  # noqa: PT017


def test_a_key_that_lies_in_the_file_in_the_clear_is_refused_and_not_shown(tmp_path):
    key, _ = make_key("predict", "ann")
    (tmp_path / "keys").write_text(f"predict:ann:{key}\n")

    with pytest.raises(ConfigurationError) as caught:
        KeyRing(tmp_path / "keys")

    assert key not in str(caught.value)


def test_a_missing_file_ends_the_start(models, tmp_path):
    with pytest.raises(ConfigurationError, match="foldserve keys add"):
        create_app(Settings(models=models, api_keys_file=tmp_path / "none"))


def test_without_a_file_everybody_may_predict_and_nobody_may_administer():
    ring = KeyRing(None)

    ring.check("predict", None)
    with pytest.raises(NotPermitted, match="foldserve keys add NAME --role admin"):
        ring.check("admin", "anything")


def test_admin_calls_are_off_while_the_file_has_no_admin_key(tmp_path):
    key, stored = make_key("predict", "ann")
    write_keys(tmp_path / "keys", [stored])

    with pytest.raises(NotPermitted, match="admin calls are off"):
        KeyRing(tmp_path / "keys").check("admin", key)


def test_an_empty_file_lets_nobody_in(tmp_path):
    (tmp_path / "keys").write_text("# all gone\n\n")

    with pytest.raises(NotAuthenticated):
        KeyRing(tmp_path / "keys").check("predict", "fsk_old")


def test_the_roles_are_separate(models, keys):
    path, clear = keys
    as_ann, as_root = ({"headers": {"authorization": f"Bearer {clear[name]}"}} for name in ("ann", "root"))

    answers = ask_each(
        models,
        path,
        [
            ("POST", "/predict", {"content": IMAGE, **as_ann}),
            ("POST", "/predict", {"content": IMAGE, "headers": {"x-api-key": clear["bob"]}}),
            ("POST", "/admin", as_root),
            ("POST", "/predict", {"content": IMAGE, **as_root}),
            ("POST", "/admin", as_ann),
        ],
    )

    assert [answer.status_code for answer in answers] == [200, 200, 200, 403, 403]
    assert_problem(answers[3], 403, "not-permitted")


@pytest.mark.parametrize("path", ["/predict", "/verify", "/models", "/models/tiny", "/models/none"])
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic YTpi"}])
def test_401_without_a_known_key(models, keys, path, headers):
    method = "GET" if path.startswith("/models") else "POST"

    (answer,) = ask_each(models, keys[0], [(method, path, {"headers": headers})])

    assert_problem(answer, 401, "not-authenticated")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_health_and_metrics_need_no_key(models, keys):
    paths = ["/healthz", "/readyz", "/metrics", "/info", "/openapi.json", "/docs", "/"]

    answers = ask_each(models, keys[0], [("GET", path, {}) for path in paths])

    assert {answer.status_code for answer in answers} == {200}


def test_predictions_may_be_public_while_admin_calls_need_a_key(models, keys):
    requests = [("POST", "/predict", {"content": IMAGE}), ("POST", "/admin", {})]

    answers = ask_each(models, keys[0], requests, public_predict=True)

    assert [answer.status_code for answer in answers] == [200, 401]


@pytest.mark.parametrize(
    "path", ["/predict", "/verify", "/v2/models/tiny/infer", "/v2/repository/index", "/v2/repository/models/tiny/load"]
)
def test_the_key_is_asked_for_before_a_byte_of_the_body_is_read(models, keys, path):
    reads = 0
    statuses = []

    async def receive():
        nonlocal reads
        reads += 1
        await asyncio.Event().wait()

    async def send(message):
        statuses.append(message.get("status"))

    async def scenario():
        settings = Settings(models=models, device="cpu", mode="off", api_keys_file=keys[0])
        scope = predict_scope() | {"path": path, "raw_path": path.encode()}
        async with running(settings, Engines()) as client:
            await asyncio.wait_for(client._transport.app(scope, receive, send), 10)

    asyncio.run(scenario())

    assert statuses[0] == 401
    assert reads == 0


def test_keys_change_without_a_restart(keys):
    path, clear = keys
    ring = KeyRing(path)
    new, stored = make_key("predict", "new")

    write_keys(path, [*(one for one in read_keys(path) if one.name != "ann"), stored])

    ring.check("predict", new)
    ring.check("predict", clear["bob"])
    with pytest.raises(NotAuthenticated):
        ring.check("predict", clear["ann"])


def test_a_key_that_is_removed_opens_nothing_where_the_folder_is_mounted(keys):
    path, clear = keys
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)  # holds the folder as a mount does: by its inode
    try:
        ring = KeyRing(Path(f"/proc/self/fd/{folder}/{path.name}"))
        ring.check("predict", clear["ann"])

        write_keys(path, [one for one in read_keys(path) if one.name != "ann"])

        with pytest.raises(NotAuthenticated):
            ring.check("predict", clear["ann"])
    finally:
        os.close(folder)


def test_compose_mounts_the_folder_of_the_keys_and_not_the_file_which_is_replaced_as_a_whole():
    service = yaml.safe_load((ROOT / "deploy" / "compose.keys.yml").read_text())["services"]["foldserve"]
    (mount,) = service["volumes"]

    assert "secrets" not in service
    assert mount["read_only"]
    assert Path(service["environment"]["FOLDSERVE_API_KEYS_FILE"]).parent == Path(mount["target"])


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600])
def test_a_changed_file_keeps_its_mode_and_owner_for_who_could_read_it_to_read_it_still(keys, mode):
    path, _ = keys
    path.chmod(mode)
    if os.getuid() == 0:  # nobody else may give a file away
        os.chown(path, 10001, 10002)
    before = path.stat()

    write_keys(path, read_keys(path)[1:])

    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino


def test_a_file_that_breaks_leaves_the_old_keys_and_says_so(keys, caplog):
    path, clear = keys
    ring = KeyRing(path)

    path.write_text("nonsense\n")
    ring.check("predict", clear["ann"])
    ring.check("predict", clear["ann"])

    assert caplog.text.count("the old API keys stay in force") == 1
    with pytest.raises(NotAuthenticated):
        ring.check("predict", "nonsense")
