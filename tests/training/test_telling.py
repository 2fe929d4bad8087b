"""What people are shown: the bar on a terminal and lines elsewhere, the records of epochs, the fold table."""

import io
import re
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from training_support import QUICK, hush

from service.manifest import FoldError, FoldRecord, KeptRecord
from training.card import fold_error_line, fold_table
from training.packaging import _size
from training.report import EpochRow, read_metrics
from training.run import train

RECORD = FoldRecord(
    norm="block1.norm", into="block1.conv", kind="Conv2d", scale_min=0.5, scale_max=2, weight_max=4, bias_max=8
)


class Terminal(io.StringIO):
    """A standard output that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@pytest.fixture
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_wide_terminal")
def test_a_terminal_gets_a_bar_with_loss_accuracy_rate_and_time_left(tmp_path: Path):
    screen = Terminal()
    with redirect_stdout(screen):
        train(replace(QUICK, epochs=2), tmp_path / "run", say=hush)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"epoch 2/2 .*loss \d\.\d{4} +accuracy \d+\.\d\d% +[\d,]+ images/s .*\d:\d\d:\d\d left", text)
    assert re.search(r"epoch 1/2 +loss .* validation", text), "each epoch leaves its line above the bar"


def test_what_is_no_terminal_gets_one_line_an_epoch_and_no_control_codes(tmp_path: Path):
    log = io.StringIO()
    with redirect_stdout(log):
        train(replace(QUICK, epochs=2), tmp_path / "run", say=hush)
    assert [line[:9] for line in log.getvalue().splitlines()] == ["epoch 1/2", "epoch 2/2"]
    assert "\x1b" not in log.getvalue()
    assert "\r" not in log.getvalue()


def test_rows_come_back_as_they_were_written(tmp_path: Path, finished_run: Path):
    rows = read_metrics(finished_run / "metrics.csv")
    assert [row.epoch for row in rows] == [1, 2, 3]
    assert all(isinstance(row, EpochRow) and 0 <= row.validation_accuracy <= 1 for row in rows)
    assert read_metrics(tmp_path / "none.csv") == []


def test_the_fold_table_has_a_line_for_each_batchnorm_folded_or_kept():
    measured = RECORD.model_copy(update={"norm": "block2.norm", "error": 3e-16})
    table = fold_table([RECORD, measured], [KeptRecord(norm="block3.norm", reason="what feeds it is a ReLU")])
    header, *lines = table.splitlines()
    assert header.split()[:3] == ["BatchNorm", "into", "kind"]
    assert [line.split()[0] for line in lines] == ["block1.norm", "block2.norm", "kept"]
    assert "not measured" in lines[0]
    assert "3.0e-16" in lines[1]
    assert "0.5 … 2" in lines[0]
    assert "8,188 ×" in lines[0], "65,504 / 8: of weight and bias the larger decides"
    assert lines[2].endswith("block3.norm: what feeds it is a ReLU")


def test_the_fold_table_says_what_lay_between_and_which_side_the_batchnorm_stood_on():
    record = RECORD.model_copy(update={"place": "before", "through": ("pool",)})
    assert "before, past pool" in fold_table([record], [])


def test_the_end_to_end_line_has_both_precisions_and_what_rounding_costs_without_folding():
    line = fold_error_line(FoldError(float64=2e-16, float32=3e-7, float32_unfolded=4e-7))
    assert "2e-16 in float64, 3e-07 in float32 (unfolded: 4e-07)" in line


def test_a_layer_whose_every_weight_is_zero_has_its_line_too():
    zeros = RECORD.model_copy(update={"scale_min": 0, "scale_max": 0, "weight_max": 0, "bias_max": 0})
    _, line = fold_table([zeros], []).splitlines()
    assert "all 0" in line


@pytest.mark.parametrize(("size", "words"), [(2_600, "2.6 kB"), (90_000, "0.09 MB"), (98_000_000, "98.00 MB")])
def test_the_size_of_a_small_file_is_not_rounded_to_nothing(size: int, words: str):
    assert _size(size) == words
