"""The command line: one clear line and the right exit code for what a person did, and never a traceback."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support import TinyModel, encode, random_pixels

pytestmark = pytest.mark.e2e

IMAGE = encode(Image.fromarray(random_pixels(1, seed=5)[0]), "PNG")
OTHER = encode(Image.fromarray(random_pixels(2, seed=5)[1]), "PNG")


def run(*words: object, module: str = "foldserve", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=cwd)


def complaint(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Return the one line that explains a failure; log lines, which begin with a date, do not count."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("foldserve")]
    assert len(lines) == 1, done.stderr
    assert lines[0] in done.stderr.splitlines()[-2:], "a usage hint may follow, nothing else"
    return lines[0]


@pytest.fixture
def images(tmp_path):
    for name, content in {
        "one.png": IMAGE,
        "other.png": OTHER,
        "text.png": b"hello",
        "cut.png": IMAGE[:60],
        "empty.png": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def copy(models, tmp_path):
    """A repository that a test may damage."""
    return shutil.copytree(models, tmp_path / "models")


@pytest.mark.parametrize("module", ["foldserve", "service"])
def test_help_names_every_flag_with_its_unit(module):
    words = ["serve", "--help"] if module == "foldserve" else ["--help"]
    done = run(*words, module=module)

    assert done.returncode == 0
    for flag in (
        "--models",
        "--host",
        "--port",
        "--device",
        "--max-batch-size",
        "--request-timeout-s",
        "seconds",
        "bytes",
    ):
        assert flag in done.stdout


def test_a_command_is_needed():
    assert run().returncode == 2


@pytest.mark.parametrize(
    "words, hint", [(["serve", "--prot", "1"], "--port"), (["predict", "a.png", "--top-kk=1"], "--top-k")]
)
def test_an_unknown_flag_is_told_with_the_nearest_name(words, hint):
    assert f"did you mean {hint}" in complaint(run(*words), 2)


@pytest.mark.parametrize(
    "words, hint",
    [
        (["predict", "a.png", "--rec"], "predict: unrecognized arguments: --rec (did you mean --recursive?)"),
        (["predict", "a.png", "--key=x"], "predict: unrecognized arguments: --key (did you mean --api-key-file?)"),
        (["models", "list", "--jsno"], "models list: unrecognized arguments: --jsno (did you mean --json?)"),
        (["perdict", "a.png"], "(did you mean predict?)"),
        (["models", "lst"], "(did you mean list?)"),
    ],
)
def test_what_was_meant_is_sought_where_it_was_typed(words, hint):
    assert hint in complaint(run(*words), 2)


@pytest.mark.parametrize("words", [["--api-key", "hush"], ["--api-key=hush"]])
def test_a_key_that_is_given_as_a_flag_is_neither_taken_nor_repeated(words):
    line = complaint(run("predict", "a.png", "--url", "http://localhost:1", *words), 2)

    assert "did you mean --api-key-file" in line
    assert "hush" not in line


@pytest.mark.parametrize(
    "flags",
    [["--port", "70000"], ["--port", "http"], ["--max-batch-size", "0"], ["--formats", "JPGE"], ["--device", "tpu"]],
)
def test_a_wrong_value_is_told_and_exits_2(models, flags):
    line = complaint(run("serve", "--models", models, *flags), 2)

    assert flags[0] in line or flags[0].strip("-") in line


def test_a_port_in_use_is_told(models):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = complaint(run("serve", "--models", models, "--port", port), 1)

    assert f"cannot listen on 127.0.0.1:{port}" in line
    assert "--port" in line


def test_an_address_that_is_not_ours_is_told(models):
    assert "cannot listen on" in complaint(run("serve", "--models", models, "--host", "no.such.host.invalid"), 1)


DAMAGES = {
    "no folder": "no such folder",
    "empty folder": "holds no model",
    "no model.onnx": "model.onnx cannot be read",
    "cut model.onnx": "model.onnx is not a sound ONNX file",
    "no golden.npz": "golden.npz is missing",
    "cut golden.npz": "golden.npz is damaged",
    "flipped golden.npz": "golden.npz is damaged",
    "other golden.npz": "logits differ",
}
SERVE, PREDICT = ["serve", "--port", "0", "--device", "cpu"], ["predict", "one.png"]


SERVED = {"no folder", "cut model.onnx", "flipped golden.npz"}  # the others by the other command, for time's sake


@pytest.mark.parametrize(
    "command, damage", [(SERVE if damage in SERVED else PREDICT, damage) for damage in DAMAGES], ids=str
)
def test_a_missing_or_damaged_model_is_told_and_exits_1(copy, images, command, damage):
    model, golden = copy / "tiny" / "1" / "model.onnx", copy / "tiny" / "1" / "golden.npz"
    match damage:
        case "no folder":
            shutil.rmtree(copy)
        case "empty folder":
            shutil.rmtree(copy / "tiny")
        case "no model.onnx":
            model.unlink()
        case "cut model.onnx":
            model.write_bytes(model.read_bytes()[:200])
        case "no golden.npz":
            golden.unlink()
        case "cut golden.npz":
            golden.write_bytes(golden.read_bytes()[:200])
        case "flipped golden.npz":
            content = bytearray(golden.read_bytes())
            content[80:90] = b"\xff" * 10
            golden.write_bytes(content)
        case "other golden.npz":
            golden.write_bytes(TinyModel(seed=2).golden().to_bytes())

    assert DAMAGES[damage] in complaint(run(*command, "--models", copy, cwd=images), 1)


def test_cuda_that_cannot_be_had_is_told_and_exits_1(models):
    done = run("serve", "--models", models, "--port", "0", "--device", "cuda", "--default-model", "dog")
    # With --default-model wrong as well the command ends on machines with CUDA too.
    assert "cuda cannot be had" in complaint(done, 1) or "default_model dog" in complaint(done, 1)


def bodies(images, models, server, *words) -> tuple[dict, dict, int]:
    here = run("predict", *words, "--models", models, "--json", cwd=images)
    there = run("predict", *words, "--url", server.url, "--json", cwd=images)
    assert here.returncode == there.returncode, here.stderr + there.stderr
    assert "Traceback" not in here.stderr + there.stderr
    return json.loads(here.stdout), json.loads(there.stdout), here.returncode


@pytest.mark.parametrize(
    "words, code",
    [
        (["one.png"], 0),
        (["one.png", "other.png", "one.png", "--logits"], 0),
        (["one.png", "--top-k", "1", "--model", "tiny"], 0),
        (["text.png", "one.png", "cut.png", "other.png"], 1),
        (["text.png", "cut.png"], 1),
        (["one.png", "empty.png", "other.png"], 1),
    ],
    ids=str,
)
def test_predict_gives_one_body_here_and_from_a_server(images, models, server, words, code):
    here, there, exit_code = bodies(images, models, server, *words)

    assert here == there
    assert exit_code == code
    names = [word for word in words if word.endswith(".png")]
    assert [one["filename"] for one in here["predictions"]] == names


def test_predict_prints_a_line_for_each_image(images, models):
    done = run("predict", "one.png", "text.png", "--models", models, cwd=images)

    assert done.returncode == 1
    first, second = done.stdout.splitlines()
    assert first.startswith("one.png ")
    assert any(label in first for label in TinyModel().labels)
    assert "%" in first
    assert second.startswith("text.png  Format not accepted: ")


@pytest.mark.parametrize(
    "words, expected",
    [
        (["nowhere.png"], "nowhere.png: No such file"),
        (["."], "Is a directory; --recursive takes the images in it"),
        (["one.png", "nowhere.png", "--csv", "out.csv"], "nowhere.png: No such file"),
        (["one.png", "--model", "dog"], "holds no model dog"),
        (["one.png", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1/models: "),
        (["one.png", "--url", "nonsense"], "nonsense/models: "),
        (["one.png", "--url", "localhost:8000"], "'localhost://'; write its address as http://host:port"),
        (["one.png", "--url", ""], "write its address as http://host:port"),
        (["one.png", "--url", "http://127.0.0.1:1"], "`foldserve serve` starts one"),
    ],
)
def test_what_cannot_be_predicted_is_told_and_exits_1(images, models, words, expected):
    where = [] if "--url" in words else ["--models", models]
    assert expected in complaint(run("predict", *words, *where, cwd=images), 1)


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_wrong_top_k_is_wrong_usage(images, models, value):
    complaint(run("predict", "one.png", "--models", models, f"--top-k={value}", cwd=images), 2)


def test_two_models_need_a_name(images, copy):
    TinyModel(mode="L", name="gray").write(copy)

    assert "choose one with --model" in complaint(run("predict", "one.png", "--models", copy, cwd=images), 1)
    assert run("predict", "one.png", "--models", copy, "--model", "gray", cwd=images).returncode == 0


def labelled(*words, cwd) -> dict:
    done = run("predict", "one.png", "--json", *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_stable_version_labels_here_as_it_does_on_a_server(images, copy, start):
    TinyModel(seed=2).write(copy, 2)
    (copy / "tiny" / "serving.json").write_text('{"stable": 1, "also": [2]}')
    url = start("--models", copy).url
    here, there = (labelled(*where, cwd=images) for where in (["--models", copy], ["--url", url]))
    other_here, other_there = (
        labelled(*where, "--model", "tiny@2", cwd=images) for where in (["--models", copy], ["--url", url])
    )

    assert (here["version"], other_here["version"]) == (1, 2)
    assert (there, other_there) == (here, other_here)
    missing = complaint(run("predict", "one.png", "--models", copy, "--model", "tiny@3", cwd=images), 1)
    assert missing.endswith("holds no version 3; it has 1, 2")


def test_predict_looks_where_the_environment_says(images, models, monkeypatch):
    monkeypatch.setenv("FOLDSERVE_MODELS", str(models))
    assert labelled(cwd=images)["model"] == "tiny"


@pytest.mark.parametrize(
    "words, told",
    [
        (["--api-key-file", "key"], "name it with --url"),
        (["--url", "http://127.0.0.1:1", "--models", "."], "--models is for labelling here"),
        (["--model", "tiny@x"], "a version is a positive integer"),
    ],
)
def test_flags_that_would_say_nothing_are_wrong_usage(images, words, told):
    assert told in complaint(run("predict", "one.png", *words, cwd=images), 2)


@pytest.mark.parametrize(
    "content", [b"fsk_one\nfsk_two\n", b"\x89PNG\xff", "fsk_ü".encode()], ids=["two", "image", "ü"]
)
def test_a_file_that_holds_no_key_is_told_and_not_repeated(images, server, content):
    (images / "key").write_bytes(content)
    done = run("predict", "one.png", "--url", server.url, "--api-key-file", "key", cwd=images)

    assert "the API key is none" in complaint(done, 1)
    assert "fsk_" not in done.stderr


def test_an_address_below_the_service_is_told(images, server):
    line = complaint(run("predict", "one.png", "--url", f"{server.url}/predict", cwd=images), 1)

    assert "--url is the root of the service" in line


def test_predict_gives_json_or_a_table_and_not_both(images, models):
    done = run("predict", "--models", models, "one.png", "--json", "--csv", "out.csv", cwd=images)

    assert done.returncode == 2
    assert "not allowed with" in done.stderr
    assert not (images / "out.csv").exists()


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_folder_is_labelled_into_a_table_with_a_row_for_each_image(images, models, server, tmp_path, is_asked):
    folder = tmp_path / "photos" / "inner"
    folder.mkdir(parents=True)
    for number in range(12):
        shutil.copy(images / "one.png", folder / f"{number:02}.PNG")
    shutil.copy(images / "text.png", folder.parent / "bad.png")
    (folder / "notes.txt").write_text("no image")
    where = ["--url", server.url] if is_asked else ["--models", models]

    done = run("predict", *where, "--recursive", tmp_path / "photos", "--csv", "out.csv", cwd=tmp_path)

    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert done.returncode == 1
    assert "12 labelled, 1 failed" in done.stderr
    assert [Path(row["filename"]).name for row in rows] == ["bad.png", *(f"{number:02}.PNG" for number in range(12))]
    assert rows[0]["error"]
    assert len({(row["label"], row["score"], row["model"], row["version"]) for row in rows[1:]}) == 1


@pytest.mark.parametrize("where", [["--url", "http://127.0.0.1:1"], ["--models", "."]], ids=["no server", "no model"])
def test_a_table_that_is_there_stays_where_nothing_is_answered(images, where):
    (images / "out.csv").write_text("of yesterday")

    complaint(run("predict", "one.png", *where, "--csv", "out.csv", cwd=images), 1)

    assert (images / "out.csv").read_text() == "of yesterday"


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_file_that_cannot_be_read_or_has_an_odd_name_ends_nothing(images, models, server, tmp_path, is_asked):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"a.png", b"odd-\xff.png", b"z.png"):
        shutil.copy(images / "one.png", folder / os.fsdecode(name))
    (folder / "b.png").symlink_to("/proc/self/mem")  # a file whose first byte cannot be read, for root neither
    words = ["--url", server.url] if is_asked else ["--models", models]

    done = run("predict", *words, "--recursive", "photos", "--csv", "out.csv", cwd=tmp_path)
    shown = run("predict", *words, "--recursive", "photos", "--json", cwd=tmp_path)
    lines = run("predict", *words, "--recursive", "photos", cwd=tmp_path)

    with (tmp_path / "out.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "out.csv: 3 labelled, 1 failed")
    assert [os.fsencode(row["filename"])[7:] for row in rows] == [b"a.png", b"b.png", b"odd-\xff.png", b"z.png"]
    assert [bool(row["label"]) for row in rows] == [True, False, True, True]
    assert rows[1]["error"] == "Input/output error"
    assert [one["filename"] for one in json.loads(shown.stdout)["predictions"]] == [row["filename"] for row in rows]
    assert "odd-\ufffd.png" in lines.stdout


def test_a_folder_without_images_is_told(models, tmp_path):
    assert "no image in this folder" in complaint(run("predict", "--recursive", tmp_path, "--models", models), 1)
