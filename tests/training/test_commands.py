"""`foldserve train`, `export` and `presets`, as a person meets them: what is printed where, and the exit code."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from training_support import QUICK

from foldserve.cli import main
from service.artifact import Artifact
from training.presets import PRESETS

LEFT_OUT = "leave out --set, --config, --skip-bad and --overwrite"
QUICKLY = [
    "--set", "epochs=2", "--set", "validation_images=1300", "--set", "batch_size=16", "--set", "device=cpu",
]  # fmt: skip


def exit_code(*arguments: str) -> int:
    """Run a command; return its exit code, argparse's own exits included."""
    try:
        return main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that was written to standard error."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("foldserve: ")
    return lines[0]


def test_presets_are_listed_one_a_line(capsys: pytest.CaptureFixture[str]):
    assert exit_code("presets") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    for line, config in zip(lines, PRESETS.values(), strict=True):
        assert {config.dataset, config.architecture, str(config.epochs)} <= set(re.findall(r"[\w+:-]+", line))


def test_train_then_export_then_predict_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, models = tmp_path / "run", tmp_path / "models"
    assert exit_code("train", "digits", *QUICKLY, "--out", str(run)) == 0
    out = capsys.readouterr().out
    assert re.search(r"^epoch 1/2 .*^epoch 2/2 ", out, re.MULTILINE | re.DOTALL)
    result = json.loads((run / "result.json").read_text())
    assert f"test accuracy {result['test_accuracy']:.2%}" in out
    assert f"next: foldserve export {run} --name digits" in out
    assert len((run / "metrics.csv").read_text().splitlines()) == 3

    assert exit_code("export", str(run), "--name", "mine", "--models", str(models)) == 0
    captured = capsys.readouterr()
    assert f"wrote {models / 'mine' / '1'}" in captured.out
    assert "0 labels flipped" in captured.out
    assert captured.err == "", "the exporter's own chatter stays off the terminal"
    folds = [line for line in captured.out.splitlines() if " Conv2d " in line]
    artifact = Artifact.load(models / "mine" / "1")
    assert len(folds) == len(artifact.manifest.folds)

    (tmp_path / "digit.png").write_bytes(artifact.golden.encoded[0])
    assert exit_code("predict", str(tmp_path / "digit.png"), "--models", str(models), "--json") == 0
    (prediction,) = json.loads(capsys.readouterr().out)["predictions"]
    assert prediction["index"] == artifact.golden.logits_float64[0].argmax()


def test_a_configuration_file_lies_between_the_preset_and_the_flags(tmp_path: Path):
    (tmp_path / "mine.toml").write_text("epochs = 9\nbatch_size = 32\nmomentum = 0.5\n")
    run = tmp_path / "run"
    assert exit_code("train", "digits", "--config", str(tmp_path / "mine.toml"), *QUICKLY, "--out", str(run)) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["epochs"], config["batch_size"], config["momentum"]) == (2, 16, 0.5)
    assert config["architecture"] == PRESETS["digits"].architecture


def test_resume_continues_with_the_runs_own_configuration(tmp_path: Path, finished_run: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "result.json").unlink()
    assert exit_code("train", "digits", "--resume", "--out", str(run)) == 0
    result = json.loads((run / "result.json").read_text())
    whole = json.loads((finished_run / "result.json").read_text())
    assert (result["epochs"], result["split"]) == (QUICK.epochs, whole["split"])
    assert result["test_accuracy"] == whole["test_accuracy"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "digit"], 2, r"digit is not a preset \(did you mean digits\?\)"),
        (
            ["train", "folder:photos"],
            2,
            "folder:photos is not a preset; images of your own: PRESET --set dataset=folder:",
        ),
        (["train", "digits", "--set", "epoch=3"], 2, r"did you mean epochs\?"),
        (["train", "digits", "--set", "lr=3"], 2, r"did you mean learning_rate\?"),
        (["import", ".", "--name", "digits"], 2, r"\. is a folder; name an ONNX file"),
        (["train", "digits", "--set", "epochs"], 2, "expected KEY=VALUE"),
        (["train", "digits", "--set", "epochs=few"], 2, "epochs = few: expected a whole number"),
        (["train", "digits", "--set", "epochs=0"], 2, "epochs = 0"),
        (["train", "digits", "--set", "seed=-1"], 2, "seed = -1"),
        (["train", "digits", "--set", "momentum=2"], 2, "momentum = 2"),
        (["train", "digits", "--set", "warmup_share=1"], 2, "warmup_share = 1"),
        (["train", "digits", "--set", "label_smoothing=2"], 2, "label_smoothing = 2"),
        (["train", "digits", "--set", "dataset=digit"], 2, r"did you mean digits\?"),
        (["train", "digits", "--set", "architecture=small-cnn"], 2, r"did you mean small_cnn\?"),
        (["train", "digits", "--set", "batch_size=100000"], 2, "batch_size = 100000"),
        (["train", "digits", "--set", "device=tpu"], 2, "device = tpu"),
        (["train", "digits", "--set", "learning_rate=high"], 2, "learning_rate = high: expected a number"),
        (["train", "digits", "--config", "none.json"], 2, r"none\.json cannot be read: No such file or directory$"),
        (["train", "digits", "--dry-run", "--resume"], 2, "try a configuration, not a run; leave out --resume"),
        (["train", "digits", "--overfit", "4", "--resume"], 2, "try a configuration, not a run; leave out --resume"),
        (["train", "digits", "--set", "validation_images=5000"], 1, "cannot hold 5,000 images out"),
        (["train", "mnist", "--data-dir", "nowhere"], 1, "--download"),
        (
            ["train", "digits", "--resume", "--out", "nowhere"],
            1,
            "folder: nowhere/config.json is missing",
        ),
        (["train", "digits", "--resume", "--set", "epochs=9"], 2, LEFT_OUT),
        (["train", "digits", "--resume", "--config", "none.json"], 2, LEFT_OUT),
        (["train", "digits", "--resume", "--skip-bad"], 2, LEFT_OUT),
        (["train", "digits", "--resume", "--overwrite"], 2, LEFT_OUT),
        (["export", "nowhere", "--name", "digits"], 1, "is not a run folder"),
        (["export", "nowhere", "--name", "../up"], 2, r"--name \.\./up"),  # before the run and its data are read
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_a_person_did_wrong_is_one_line_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: list[str], code: int, words: str
):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == code
    assert re.search(words, only_error(capsys))
    assert list(tmp_path.iterdir()) == [], "and nothing is left behind"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "PRESET"),
        (["train", "digits", "--epoch", "3"], "unrecognized arguments: --epoch"),
        (["train", "digits", "--resme"], r"did you mean --resume\?"),
        (["train", "digits", "--dry-run", "--overfit", "4"], "--overfit: not allowed with argument --dry-run"),
        (["export", "run"], "--name"),
        (["exprot", "run"], "exprot"),
    ],
    ids=str,
)
def test_wrong_usage_exits_with_2_and_points_to_the_help(capsys, arguments: list[str], words: str):
    assert exit_code(*arguments) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert "--help" in error
    assert "Traceback" not in error


def test_an_existing_run_is_refused_in_one_line(tmp_path: Path, capsys, finished_run: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert exit_code("train", "digits", *QUICKLY, "--out", str(run)) == 1
    assert "--overwrite" in only_error(capsys)


def test_an_unfinished_run_is_not_exported(tmp_path: Path, capsys, finished_run: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "result.json").unlink()
    assert exit_code("export", str(run), "--name", "digits", "--models", str(tmp_path / "models")) == 1
    assert "--resume" in only_error(capsys)
    assert not (tmp_path / "models").exists()


def test_a_bad_model_name_is_wrong_usage(tmp_path: Path, capsys, finished_run: Path):
    assert exit_code("export", str(finished_run), "--name", "../up", "--models", str(tmp_path / "models")) == 2
    assert "--name ../up" in only_error(capsys)


@pytest.mark.parametrize("damage", ["best.safetensors", "result.json", "config.json"])
def test_a_damaged_run_is_refused_in_one_line(tmp_path: Path, capsys, finished_run: Path, damage: str):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / damage).write_bytes(b"\xff garbage")
    assert exit_code("export", str(run), "--name", "digits", "--models", str(tmp_path / "models")) == 1
    assert damage in only_error(capsys)


@pytest.mark.parametrize("command", ["train", "export", "presets"])
def test_each_command_has_help(capsys, command: str):
    assert exit_code(command, "--help") == 0
    assert command in capsys.readouterr().out


def test_a_run_that_goes_on_prepares_what_its_own_configuration_asks_for(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(replace(PRESETS["digits"], deterministic=True).to_json())
    (run / "result.json").write_text("{}")
    assert main(["train", "digits", "--resume", "--out", str(run)]) != 0
    assert "last.safetensors is gone" in capsys.readouterr().err
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8", "cuBLAS reads it once, before the first product"
