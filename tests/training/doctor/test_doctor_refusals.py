"""Checkpoints whose BatchNorm no network can have are refused in a sentence."""

from pathlib import Path

import pytest
import torch

from foldserve.cli import main

ZEROS, ONES = torch.zeros(3), torch.ones(3)
CASES = {
    "two counts": {"num_batches_tracked": torch.tensor([5, 6])},
    "no numbers": {"running_mean": torch.zeros(3, device="meta")},
    "two widths": {"running_var": torch.ones(4)},
    "no channels": {"running_mean": torch.zeros(0), "running_var": torch.zeros(0)},
    "sparse": {"running_mean": ZEROS.to_sparse()},
    "a matrix": {"running_mean": torch.zeros(3, 3), "running_var": torch.ones(3, 3)},
    "another width of weight": {"weight": torch.ones(5)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_batchnorm_that_cannot_be_is_refused_and_nothing_is_written(tmp_path: Path, capsys, case: str):
    state = {"running_mean": ZEROS, "running_var": ONES} | CASES[case]
    path, out = tmp_path / "odd.pt", tmp_path / "out.safetensors"
    torch.save({f"bn.{name}": tensor for name, tensor in state.items()}, path)
    for command in (["inspect", str(path)], ["repair", str(path), "--out", str(out), "--momentum", "0.1"]):
        assert main(command) == 1
        assert "expected dense tensors, one number a channel in each" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_checkpoint_is_told_so(tmp_path: Path, capsys):
    (tmp_path / "empty.pt").write_bytes(b"")
    assert main(["inspect", str(tmp_path / "empty.pt")]) == 1
    assert "empty.pt is not a sound checkpoint (EOFError); save it again" in capsys.readouterr().err
