"""`foldserve evaluate`: what is counted, against hand calculations, and the report of a real run."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from foldserve.cli import main
from training.evaluation.measures import calibration, class_scores, confusion, probabilities, worst
from training.packaging import Exported
from training.run import Trained

REPORT = {
    "confusion.png", "reliability.png", "worst.png", "confusion.csv", "classes.csv", "worst.csv", "evaluation.json",
    "evaluation.html",
}  # fmt: skip


def test_calibration_error_by_hand():
    """Two bins: below ½ one right of two at 0.3 and 0.5; above, one right of three at 0.6, 0.8 and 1."""
    found = calibration(np.array([0.3, 0.5, 0.6, 0.8, 1.0]), np.array([True, False, False, True, False]), bins=2)
    assert found.counts.tolist() == [2, 3]
    assert found.confidence == pytest.approx([0.4, 0.8])
    assert found.accuracy == pytest.approx([0.5, 1 / 3])
    assert found.error == pytest.approx(2 / 5 * 0.1 + 3 / 5 * (0.8 - 1 / 3))
    assert found.largest == pytest.approx(0.8 - 1 / 3)


def test_who_is_sure_and_right_is_calibrated():
    assert calibration(np.ones(7), np.ones(7, bool)).error == 0
    assert calibration(np.zeros(2), np.ones(2, bool)).counts[0] == 2, "a confidence of 0 is in the first bin"


def test_confusion_and_class_scores_by_hand():
    matrix = confusion(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 0]), classes=3)
    assert matrix.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    zero, one, none = class_scores(matrix, ("zero", "one", "none"))
    assert (zero.images, zero.precision, zero.recall, zero.f1) == (3, 2 / 3, 2 / 3, 2 / 3)
    assert (one.images, one.precision, one.recall, one.f1) == (2, 0.5, 0.5, 0.5)
    assert (none.images, none.precision, none.recall, none.f1) == (0, None, None, None)


def test_the_worst_images_come_worst_first():
    chances = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    assert worst(chances, np.array([0, 0, 0]), 2).tolist() == [1, 2]


def test_probabilities_of_large_logits_are_finite():
    assert probabilities(np.array([[1e4, 1e4 - np.log(3)]])) == pytest.approx(np.array([[0.75, 0.25]]))


def test_a_run_is_reported_with_the_accuracy_that_training_saw(finished_run: Path, trained: Trained, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["evaluate", str(finished_run), "--out", str(out), "--worst", "9"]) == 0
    assert {path.name for path in out.iterdir()} == REPORT
    numbers = json.loads((out / "evaluation.json").read_text())
    assert numbers["accuracy"] == trained.result["test_accuracy"]
    assert f"{numbers['accuracy']:.2%} of 360 test images" in capsys.readouterr().out
    matrix = [row[1:] for row in csv.reader((out / "confusion.csv").read_text().splitlines())][1:]
    counts = np.array(matrix, int)
    assert counts.sum() == 360
    assert np.trace(counts) / 360 == pytest.approx(numbers["accuracy"])
    assert len((out / "worst.csv").read_text().splitlines()) == 10


def test_the_page_holds_its_pictures_and_asks_nobody(finished_run: Path, tmp_path: Path):
    assert main(["evaluate", str(finished_run), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "evaluation.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 3
    assert not re.search(r"https?://|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", page))


def test_the_report_lies_in_the_run_by_default_and_can_be_written_again(finished_run: Path, tmp_path: Path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert main(["evaluate", str(run)]) == 0
    before = (run / "evaluation" / "evaluation.json").read_bytes()
    assert main(["evaluate", str(run)]) == 0
    assert (run / "evaluation" / "evaluation.json").read_bytes() == before


def test_a_models_card_gets_the_evaluation_once(finished_run: Path, exported: Exported, tmp_path: Path):
    model = shutil.copytree(exported.folder, tmp_path / "model" / "1")
    (model / "README.md").write_text("# mine, version 1\n\n## Each BatchNorm\n\nas it was\n")
    for _ in range(2):
        assert main(["evaluate", str(finished_run), "--out", str(tmp_path / "out"), "--card", str(model)]) == 0
    card = (model / "README.md").read_text()
    assert card.startswith("# mine, version 1\n\n## Each BatchNorm\n\nas it was\n")
    assert card.count("## Evaluation") == 1
    assert re.search(r"expected calibration error \d+\.\d\d%", card)
    assert card.count("\n| ") == 11, "a head and ten digits"


def test_a_card_of_another_runs_model_is_left_alone(finished_run: Path, exported: Exported, tmp_path: Path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"seed": 7}))
    before = (exported.folder / "README.md").read_bytes()
    assert main(["evaluate", str(run), "--out", str(tmp_path / "out"), "--card", str(exported.folder)]) == 2
    assert "is another run's: its seed is 0, this run's 7; export this run" in capsys.readouterr().err
    assert (exported.folder / "README.md").read_bytes() == before


def test_a_model_without_its_card_is_named(finished_run: Path, exported: Exported, tmp_path: Path, capsys):
    model = shutil.copytree(exported.folder, tmp_path / "1")
    (model / "README.md").unlink()
    assert main(["evaluate", str(finished_run), "--out", str(tmp_path / "out"), "--card", str(model)]) == 1
    assert f"{model}/README.md is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["nowhere"], 1, "nowhere is not a run folder"),
        (["RUN", "--worst", "0"], 2, "--worst 0: expected at least 1"),
        (["RUN", "--card", "nowhere"], 1, r"nowhere/model\.onnx cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    finished_run: Path, tmp_path: Path, monkeypatch, capsys, arguments: list[str], code: int, words: str
):
    monkeypatch.chdir(tmp_path)
    named = [str(finished_run) if one == "RUN" else one for one in arguments]
    assert main(["evaluate", *named, "--out", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert len(error.splitlines()) == 1


def test_a_run_whose_data_set_is_gone_says_where_it_looked(finished_run: Path, tmp_path: Path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "dataset": "mnist"}))
    assert main(["evaluate", str(run), "--data-dir", str(tmp_path / "gone")]) == 1
    assert re.search(r"mnist is not in .*gone.*--data-dir", capsys.readouterr().err)
