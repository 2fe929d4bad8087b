"""`foldserve inspect` as a person meets it: exit codes, JSON, the page, and files that are no good."""

import json
import pickle
import re
import sys
import warnings
from pathlib import Path

import onnx
import pytest
import torch
from foreign_support import Graph, network
from onnx import external_data_helper

from foldserve.cli import main
from training.doctor.findings import CHECKS


def test_a_healthy_file_exits_with_0_and_a_broken_one_with_1(tmp_path: Path, capsys):
    assert main(["inspect", str(Graph().write(tmp_path))]) == 0
    assert "0 errors, 1 warning" in capsys.readouterr().out
    assert main(["inspect", str(Graph(training_mode=True).write(tmp_path))]) == 1
    out = capsys.readouterr().out
    for word in ("BatchNorm in training mode", "model.eval()", "norm"):
        assert word in out


def test_json_has_every_finding_with_its_words(tmp_path: Path, capsys):
    assert main(["inspect", str(Graph(batch=1).write(tmp_path)), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["errors"], report["warnings"]) == (0, 2)
    for finding in report["findings"]:
        assert finding["severity"] == "warning"
        assert all(finding[key] for key in ("check", "title", "observed", "explanation", "mend"))


def test_the_report_as_json_keeps_its_keys(tmp_path: Path, capsys):
    """Who reads it with a machine relies on these; a change needs another number in `schema`."""
    main(["inspect", str(Graph(training_mode=True).write(tmp_path)), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == 1
    assert report.keys() == {
        "schema", "path", "kind", "layers", "folded", "findings", "notes", "data", "errors", "warnings"
    }  # fmt: skip
    words = {"check", "severity", "title", "observed", "where", "explanation", "mend"}
    assert all(finding.keys() == words for finding in report["findings"])
    assert [finding["severity"] for finding in report["findings"]] == ["error"]


ERRORS = {
    "statistics-missing", "never-updated", "initial-statistics", "not-finite", "negative-variance", "training-mode",
    "batch-statistics",
}  # fmt: skip


def test_errors_are_what_gives_wrong_answers_and_the_rest_are_warnings():
    """Missing, never updated, over 10 % initial, not finite or negative, training mode, statistics of the batch."""
    assert {name for name, check in CHECKS.items() if check.severity == "error"} == ERRORS
    assert {check.severity for check in CHECKS.values()} == {"error", "warning"}
    assert all(check.title and check.explanation and check.mend for check in CHECKS.values())


def test_every_check_is_documented_with_its_severity():
    page = (Path(__file__).parents[3] / "docs" / "inspect.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in page.splitlines() if line[:3] == "| `"}
    assert {name: rows[f"`{name}`"] for name in CHECKS} == {name: check.severity for name, check in CHECKS.items()}


def test_the_page_needs_no_other_file_and_escapes_what_the_model_brings(tmp_path: Path, capsys):
    model = Graph().model()
    next(node for node in model.graph.node if node.op_type == "BatchNormalization").name = "<script>"
    onnx.save(model, tmp_path / "x.onnx")
    assert main(["inspect", str(tmp_path / "x.onnx"), "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().err == f"wrote {tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    assert "http" not in page
    assert "&lt;script&gt;" in page


class Bomb:
    """Unpickling it would leave a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("legacy", [True, False], ids=["bare pickle", "torch.save"])
def test_pickled_code_is_refused_and_never_run(tmp_path: Path, capsys, legacy: bool):
    trace, path = tmp_path / "was-run", tmp_path / "bad.pt"
    content = {"state_dict": network().state_dict(), "extra": Bomb(trace)}
    path.write_bytes(pickle.dumps(content)) if legacy else torch.save(content, path)
    assert main(["inspect", str(path)]) == 1
    assert "not run" in capsys.readouterr().err
    assert not trace.exists()


def test_a_pickled_module_is_refused_with_the_mend(tmp_path: Path, capsys):
    torch.save(network(), tmp_path / "module.pth")
    assert main(["inspect", str(tmp_path / "module.pth")]) == 1
    refusal = capsys.readouterr().err
    assert f"holds pickled code ({type(network()).__module__}.Network) and was not run" in refusal
    assert "state_dict()" in refusal


def test_a_torchscript_archive_is_refused_without_the_advice_to_run_it(tmp_path: Path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is old, and in use
        torch.jit.save(torch.jit.trace(network(), torch.zeros(1, 3, 12, 12)), tmp_path / "script.pt")
    assert main(["inspect", str(tmp_path / "script.pt")]) == 1
    refusal = capsys.readouterr().err
    assert "TorchScript archive, which holds code, and was not run" in refusal
    assert "weights_only" not in refusal


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_checkpoint_is_refused_in_words(tmp_path: Path, capsys, content: bytes):
    (tmp_path / "other.pt").write_bytes(content)
    assert main(["inspect", str(tmp_path / "other.pt")]) == 1
    assert re.search(r"is not a sound checkpoint \([^0-9]{20,100}\); save it again\n$", capsys.readouterr().err)


def _external(folder: Path) -> Path:
    return Graph().write(folder, save_as_external_data=True, location="w.data", size_threshold=0)


def test_external_data_beside_the_file_is_read(tmp_path: Path):
    assert main(["inspect", str(_external(tmp_path))]) == 0


def _truncate(path: Path):
    data = path.with_name("w.data")
    data.write_bytes(data.read_bytes()[:-10])


def _point_to(location: str):
    def change(path: Path):
        (path.parent.parent / "outside.data").write_bytes(b"\0" * 10**5)
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            del tensor.external_data[:]
            tensor.raw_data = b"0"  # what onnx wants to see before it points elsewhere
            external_data_helper.set_external_data(tensor, location.format(up=path.parent.parent))
            tensor.ClearField("raw_data")
            tensor.data_location = tensor.EXTERNAL
        path.write_bytes(model.SerializeToString())

    return change


def _link(path: Path):
    data = path.with_name("w.data")
    data.rename(path.parent.parent / "outside.data")
    data.symlink_to(path.parent.parent / "outside.data")


def _large(path: Path):
    with path.open("r+b") as file:
        file.truncate(2**31)  # sparse: it takes no room


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, "cut short"),
        (_point_to("../outside.data"), "outside its own folder"),
        (_point_to("{up}/outside.data"), "outside its own folder"),
        (_link, "outside its own folder"),
        (_point_to("gone.data"), "missing"),
        (_large, "over 2 GB"),
        (lambda path: path.write_bytes(b"PK\x03\x04 no model"), "not an ONNX"),
        (lambda path: path.write_bytes(b""), "not an ONNX"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "not an ONNX|not a sound ONNX"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["truncated", "up", "absolute", "link", "missing data", "2 GB", "another file", "empty", "cut", "gone"],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, capsys, damage, words: str):
    folder = tmp_path / "inner"
    folder.mkdir()
    path = _external(folder)
    damage(path)
    assert main(["inspect", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert re.search(words, captured.err)


@pytest.mark.parametrize("momentum", ["1.5", "0", "x", "nan"])
def test_a_momentum_that_cannot_be_is_wrong_usage(tmp_path: Path, capsys, momentum: str):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path / "x.onnx"), "--momentum", momentum])
    assert stop.value.code == 2
    assert "PyTorch's sense" in capsys.readouterr().err
    assert "torch" in sys.modules
