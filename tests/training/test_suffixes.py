"""What a file is, its suffix says in any case."""

from pathlib import Path

import pytest
import torch
from foreign_support import CLASSES, Graph, network
from safetensors.torch import save_file
from training_support import idx_files, write_idx

from foldserve.cli import main
from training.config import read_config_file
from training.data.idx import read_idx
from training.importing.labels import read_labels


@pytest.fixture(params=["UP.ONNX", "UP.SafeTensors", "UP.PT", "UP.PTH"])
def upper(request, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    if path.suffix == ".ONNX":
        return Graph().write(tmp_path).rename(path)
    state = {name: tensor.contiguous() for name, tensor in network().state_dict().items()}
    (save_file if path.suffix == ".SafeTensors" else torch.save)(state, path)
    return path


def test_a_file_is_inspected_and_repaired_whatever_the_case_of_its_suffix(tmp_path: Path, upper: Path, capsys):
    assert main(["inspect", str(upper)]) == 0, capsys.readouterr()
    out = tmp_path / ("mended.Onnx" if upper.suffix == ".ONNX" else "mended.SAFETENSORS")
    assert main(["repair", str(upper), "--out", str(out), "--momentum", "0.1", "--updates", "200"]) == 0
    assert main(["inspect", str(out), "--momentum", "0.1"]) == 0, capsys.readouterr()


@pytest.mark.parametrize(("name", "words"), [("UP.PT", "foldserve export PACKAGE"), ("UP.Keras", "model.export")])
def test_what_is_no_onnx_file_is_told_its_way_whatever_the_case(tmp_path: Path, capsys, name: str, words: str):
    (tmp_path / name).write_bytes(b"anything")
    assert main(["import", str(tmp_path / name), "--name", "x", "--models", str(tmp_path / "models")]) == 2
    assert words in capsys.readouterr().err


def test_labels_and_keys_are_read_whatever_the_case(tmp_path: Path):
    (tmp_path / "labels.JSON").write_text(str(list("abcdefghij")[:CLASSES]).replace("'", '"'))
    assert read_labels(tmp_path / "labels.JSON", CLASSES) == tuple("abcdefghij")[:CLASSES]
    (tmp_path / "mine.Toml").write_text("epochs = 3")
    assert read_config_file(tmp_path / "mine.Toml") == {"epochs": 3}


def test_packed_idx_files_are_unpacked_whatever_the_case(tmp_path: Path):
    write_idx(tmp_path, idx_files())
    for packed in tmp_path.rglob("*.gz"):
        assert len(read_idx(packed.rename(packed.with_suffix(".GZ"))))
