"""Batch independence as its user meets it: real processes that probe, keep certificates, refuse, and print."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from broken_models import MIXING_NODE, UNKNOWN_NODE, mix_images, use_unknown_operator, write_broken
from e2e_support import get, post
from PIL import Image
from support import TinyModel, encode, random_pixels

pytestmark = pytest.mark.e2e

IMAGE = encode(Image.fromarray(random_pixels(1, seed=5)[0]), "PNG")
COMMAND = [sys.executable, "-m", "foldserve"]


def certify(models, *words: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "certify", "--models", models, "--device", "cpu", *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=60)


def table_of(done: subprocess.CompletedProcess[str], code: int = 0) -> dict[str, str]:
    """Return the printed certificate, its rows by name."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    rows = (line.partition("  ") for line in done.stdout.splitlines() if not line.startswith(" "))
    return {name: value.strip() for name, _, value in rows}


def files_in(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def certificates_in(state) -> dict[str, dict]:
    return {name: json.loads(content) for name, content in files_in(state).items()}


def split_costs(certificate: dict) -> tuple[dict, dict[tuple[int, int], dict]]:
    """Return a certificate without the costs, and the costs by batch size and threads."""
    measured = dict(certificate["measured"])
    costs = {(cost["shape"]["batch_size"], cost["shape"]["threads"]): cost for cost in measured.pop("costs")}
    return certificate | {"measured": measured}, costs


def assert_same(later: dict, earlier: dict) -> None:
    """Two certificates are one, but for costs measured beside other work: each start measures them again, and may find
    less or a calm run.
    """
    rest, costs = split_costs(later)
    former_rest, former_costs = split_costs(earlier)
    assert rest == former_rest
    assert costs.keys() == former_costs.keys()
    for shape, former in former_costs.items():
        if former["is_calm"]:
            assert costs[shape] == former
        assert costs[shape]["seconds"] <= former["seconds"]


def assert_kept(later: dict[str, dict], earlier: dict[str, dict]) -> None:
    """What a state folder keeps stays as it is."""
    assert later.keys() == earlier.keys()
    for name, file in earlier.items():
        assert later[name]["digest"] == file["digest"]
        assert_same(later[name]["certificate"], file["certificate"])


def served_certificate(server) -> dict:
    certificate = get(f"{server.url}/models/tiny").json()["certificate"]
    answer = post(server.url, IMAGE)
    assert answer.headers["foldserve-certificate"] != "none", "it is served as certified"
    assert certificate["verdict"] == "certified"
    return certificate


@pytest.fixture
def state(tmp_path):
    """A state folder of one's own, not made yet."""
    return tmp_path / "fresh" / "state"


@pytest.fixture
def broken(tmp_path):
    """A repository with a model that mixes images and one with an operator that nobody knows."""
    write_broken(tmp_path / "broken", mix_images, TinyModel(name="mixing"))
    write_broken(tmp_path / "broken", use_unknown_operator, TinyModel(name="unknown"))
    return tmp_path / "broken"


def test_the_first_start_probes_and_keeps_what_the_second_one_uses(start, models, state):
    before = start("--models", models, "--state", state)
    first = served_certificate(before)
    kept = certificates_in(state)
    second = start("--models", models, "--state", state)
    again = served_certificate(second)

    assert len(kept) == 1
    assert all(name.startswith("certificates/") and name.endswith(".json") for name in kept)
    assert_same(again, first)
    assert_kept(certificates_in(state), kept)
    assert "checking the kept certificate" in second.said()
    assert "checking the kept certificate" not in before.said()
    assert "not believed" not in second.said()


def test_what_certify_keeps_a_server_uses(start, models, state):
    printed = table_of(certify(models, "tiny", "--state", state))
    kept = certificates_in(state)
    server = start("--models", models, "--state", state)

    served_certificate(server)
    assert_kept(certificates_in(state), kept)
    assert get(f"{server.url}/info").json()["models"]["tiny"]["certificate"] == printed["certificate"]
    assert printed["answers"].startswith(get(f"{server.url}/info").json()["models"]["tiny"]["answer_digest"])


def edit(content: bytes) -> bytes:
    certificate = json.loads(content)
    certificate["certificate"]["shapes"].append({"batch_size": 64, "threads": 1})
    return json.dumps(certificate).encode()


@pytest.mark.parametrize(
    "damage, reason",
    [(edit, "it was edited"), (lambda content: content[:300], "cannot be read"), (lambda _: b"", "cannot be read")],
    ids=["edited", "cut", "empty"],
)
def test_a_kept_certificate_that_was_changed_is_not_believed_and_made_again(models, state, damage, reason):
    certify(models, "tiny", "--state", state)
    (kept,) = (state / "certificates").iterdir()
    sound = json.loads(kept.read_bytes())
    kept.write_bytes(damage(kept.read_bytes()))

    done = certify(models, "tiny", "--state", state)

    assert table_of(done)["certificate"] == sound["digest"]
    assert "not believed" in done.stderr
    assert reason in done.stderr
    assert json.loads(kept.read_bytes())["digest"] == sound["digest"], "a sound one is kept again"


def test_a_certificate_of_another_machine_is_not_believed(start, models, state):
    certify(models, "tiny", "--state", state)
    (kept,) = (state / "certificates").iterdir()
    foreign = certify(models, "tiny", "--state", state.parent / "other", "--max-batch-size", "2")
    assert foreign.returncode == 0
    (other,) = (state.parent / "other" / "certificates").iterdir()
    shutil.copy(other, kept)

    server = start("--models", models, "--state", state)

    assert "not believed: it belongs to another machine, model or setting" in server.said()
    assert {one["batch_size"] for one in served_certificate(server)["shapes"]} == {1, 2, 4, 8}


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_probe_ends_it_with_nothing_half_written(models, state, tmp_path, sent):
    log = tmp_path / "server.log"
    words = ["serve", "--port", 0, "--device", "cpu", "--models", models, "--state", state, "--max-batch-size", 1024]
    with log.open("wb") as sink:
        process = subprocess.Popen([*COMMAND, *map(str, words)], stdout=sink, stderr=sink)
    try:
        deadline = time.monotonic() + 30
        while "probing tiny: batch" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        process.send_signal(sent)
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()

    assert "ready: serving" not in log.read_text(), "the probe was still under way"
    assert "Traceback" not in log.read_text()
    assert not state.exists() or files_in(state) == {}


def test_models_are_only_read(models, state, tmp_path):
    copy = shutil.copytree(models, tmp_path / "models")
    before = files_in(copy)
    for folder in (copy, *copy.rglob("*")):
        folder.chmod(0o500 if folder.is_dir() else 0o400)

    assert table_of(certify(copy, "tiny", "--state", state))["verdict"] == "CERTIFIED"
    assert files_in(copy) == before


@pytest.mark.parametrize("place", [".", "certificates"])
def test_a_state_folder_that_cannot_be_written_costs_a_warning_and_no_more(models, state, place):
    state.parent.mkdir()
    if place != ".":
        state.mkdir()
    (state / place).write_bytes(b"a file where the folder should be, which stops root too")

    done = certify(models, "tiny", "--state", state)

    assert table_of(done)["verdict"] == "CERTIFIED"
    assert "could not be kept" in done.stderr


def test_certify_prints_a_certificate_that_a_person_reads(models, state):
    done = certify(models, "tiny@1", "--state", state)
    rows = table_of(done)

    assert (rows["verdict"], rows["model"]) == ("CERTIFIED", "tiny version 1, float form")
    assert rows["operators"].startswith("independent")
    assert "reference" in done.stdout
    assert done.stderr == ""


def test_quick_keeps_nothing_and_json_is_json(models, state):
    done = certify(models, "tiny", "--quick", "--json", "--state", state)

    assert json.loads(done.stdout)["verdict"] == "certified"
    assert done.returncode == 0
    assert not state.exists()


def test_the_demonstration_counts_no_difference_here_and_many_in_the_plain_runtime(models, state):
    done = certify(models, "tiny", "--quick", "--demo", "--state", state)
    counts = [line.split()[0] for line in done.stdout.splitlines() if "numbers differ" in line]

    assert done.returncode == 0, done.stderr
    assert counts[0] == "0"
    assert int(counts[1].replace(",", "")) > 0
    assert "0 of " in done.stdout


def test_json_stays_json_with_the_demonstration(models, state):
    done = certify(models, "tiny", "--quick", "--json", "--demo", "--state", state)

    assert done.returncode == 2 or json.loads(done.stdout)["verdict"] == "certified"


@pytest.mark.parametrize("name, node", [("mixing", MIXING_NODE), ("unknown", UNKNOWN_NODE)])
def test_a_model_that_is_refused_exits_1_and_names_the_node(broken, state, name, node):
    done = certify(broken, name, "--state", state)

    assert table_of(done, 1)["verdict"] == "REFUSED"
    assert node in done.stdout
    assert "equal bits" not in done.stdout, "no promise"
    assert not state.exists(), "a refusal is not kept"


def test_serve_refuses_a_mixing_model_with_one_line_and_exits_1(broken):
    command = [*COMMAND, "serve", "--port", "0", "--device", "cpu", "--models", str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("foldserve: ")]
    assert MIXING_NODE in line
    assert "--mode report" in line


@pytest.mark.parametrize("name, code", [("tiny@x", 2), ("tiny@", 2), ("tiny@2", 1), ("dog", 1), ("../tiny", 1)])
def test_a_name_that_is_none_is_told(models, state, name, code):
    done = certify(models, name, "--state", state)

    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
