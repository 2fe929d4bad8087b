"""`foldserve models`: what the repository holds, one version less, another version first."""

import json
import os
import pty
import subprocess
import sys

import pytest
from exact_service import write_exact
from support import TinyModel

from foldserve.cli import main
from service.rollout import Plan, read_rollout


@pytest.fixture
def root(tmp_path):
    for version in (1, 2, 3):
        TinyModel(seed=version).write(tmp_path / "models", version)
    return tmp_path / "models"


@pytest.fixture
def models(root, capsys):
    def run(*words: str) -> tuple[int, str]:
        status = main(["models", *words, "--models", str(root)])
        seen = capsys.readouterr()
        return status, seen.out + seen.err

    return run


def present(root) -> list[str]:
    return sorted(one.name for one in (root / "tiny").iterdir() if one.is_dir())


def serve(root, **rollout) -> None:
    (root / "tiny" / "serving.json").write_text(json.dumps(rollout))


def test_the_list_marks_what_is_served_and_as_what(root, models):
    serve(root, stable=1, canary=3, canary_share=0.05)
    write_exact(root)
    found = json.loads(models("list", "--json")[1])

    assert [(one["name"], one["version"], one["roles"]) for one in found] == [
        ("exact", 1, ["stable"]),
        ("tiny", 1, ["stable"]),
        ("tiny", 2, []),
        ("tiny", 3, ["canary 5%"]),
    ]
    assert found[0]["forms"] == ["float", "exact"]
    assert found[1]["classes"] == 3


def test_a_damaged_version_is_listed_with_its_reason(root, models):
    (root / "tiny" / "2" / "model.onnx").write_bytes(b"hello")

    assert "is not a sound ONNX file" in models("list")[1]


def test_show_puts_both_forms_side_by_side(root, models):
    write_exact(root)
    status, text = models("show", "exact", "--runs", "1", "--json")
    document = json.loads(text[text.index("{\n") :])

    assert status == 0
    assert [one["form"] for one in document["forms"]] == ["float", "exact"]
    assert all(set(one["cpu_ms"]) == {"1", "8"} for one in document["forms"])
    assert document["manifest"]["name"] == "exact"


def test_show_takes_the_stable_version_unless_one_is_named(root, models):
    serve(root, stable=2)

    assert "tiny version 2 (stable)" in models("show", "tiny", "--runs", "1")[1]
    assert "tiny version 3 (not served)" in models("show", "tiny@3", "--runs", "1")[1]


def test_what_is_not_served_is_removed_whole(root, models):
    status, text = models("remove", "tiny@1")

    assert (status, present(root)) == (0, ["2", "3"])
    assert "removed tiny version 1; version 3 answers" in text


@pytest.mark.parametrize("rollout", [{"stable": 2}, {"canary": 2, "canary_share": 0.5}, {"shadow": 2}, {"also": [2]}])
def test_what_is_served_is_kept_unless_yes_is_said_and_then_leaves_a_plan(root, models, rollout):
    serve(root, **rollout)
    status, text = models("remove", "tiny@2")

    assert (status, present(root)) == (1, ["1", "2", "3"])
    assert "--yes" in text
    assert models("remove", "tiny@2", "--yes")[0] == 0
    assert read_rollout(root / "tiny").plan([1, 3]) == Plan(3)


def test_the_only_version_goes_with_its_model(root, models):
    serve(root, stable=3)
    for version in (1, 2):
        assert models("remove", f"tiny@{version}")[0] == 0

    assert "only version" in models("remove", "tiny@3")[1]
    assert models("remove", "tiny@3", "--yes")[0] == 0
    assert not (root / "tiny").exists()


def test_a_serving_file_that_cannot_be_read_keeps_the_version_whole(root, models):
    (root / "tiny" / "serving.json").write_text("{")
    status, text = models("remove", "tiny@1", "--yes")

    assert (status, present(root)) == (1, ["1", "2", "3"])
    assert "is still there" in text


def test_rollback_makes_the_version_before_stable_and_keeps_the_rest(root, models):
    serve(root, also=[1])
    status, text = models("rollback", "tiny")

    assert status == 0
    assert "version 2 is stable, until now it was 3" in text
    assert json.loads((root / "tiny" / "serving.json").read_text()) == {"stable": 2, "also": [1]}
    assert models("rollback", "tiny", "--to", "3")[0] == 0
    assert read_rollout(root / "tiny").stable == 3


@pytest.mark.parametrize("words, message", [(["--to", "3"], "stable already"), (["--to", "9"], "9 is not there")])
def test_a_rollback_that_cannot_be_changes_nothing(root, models, words, message):
    status, text = models("rollback", "tiny", *words)

    assert (status, message in text) == (1, True)
    assert not (root / "tiny" / "serving.json").exists()


def test_a_rollback_to_a_damaged_version_is_refused(root, models):
    (root / "tiny" / "2" / "model.onnx").write_bytes(b"hello")

    assert models("rollback", "tiny")[0] == 1
    assert not (root / "tiny" / "serving.json").exists()


@pytest.mark.parametrize(
    "words, status",
    [(["show", "tiny@x"], 2), (["remove", "tiny"], 2), (["show", "tiny", "--runs", "0"], 2), (["show", "other"], 1)],
)
def test_wrong_words_and_what_is_not_there_have_their_own_exit_codes(models, words, status):
    assert models(*words)[0] == status


@pytest.mark.parametrize("answer, left", [(b"y\n", ["2", "3"]), (b"n\n", ["1", "2", "3"]), (b"\x04", ["1", "2", "3"])])
def test_on_a_terminal_a_person_is_asked_first(root, answer, left):
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    command = [sys.executable, "-m", "foldserve", "models", "remove", "tiny@1", "--models", str(root)]
    done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, check=False, timeout=60)
    os.close(ours)
    os.close(theirs)

    assert "[y/N]" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert (done.returncode, present(root)) == (0 if len(left) == 2 else 1, left)
