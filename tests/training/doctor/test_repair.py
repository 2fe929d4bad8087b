"""`foldserve repair`: what it takes out is exactly what was left of the start; what it gathers is the population."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from foreign_support import SIDE, Graph, Network, network, torch_export
from PIL import Image
from safetensors.torch import load_file, save_file

from foldserve.cli import main
from training.doctor.examine import inspect
from training.doctor.read import read_subject

UPDATES = 15  # 0.9^15 = 21 % of the start is left


@pytest.fixture
def cold(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint after a few steps at momentum 0.1, and the same means without the start, by another road."""
    torch.manual_seed(0)
    model, sums = Network(), {}
    for name in ("bn1", "bn2"):

        def watch(norm, given, name=name):
            (features,) = given
            mean, var = features.mean((0, 2, 3)).double(), features.var((0, 2, 3)).double()
            old = sums.get(name, (0.0, 0.0, 0.0))
            sums[name] = (0.9 * old[0] + 0.1 * mean, 0.9 * old[1] + 0.1 * var, 0.9 * old[2] + 0.1)

        getattr(model, name).register_forward_pre_hook(watch)
    with torch.no_grad():
        for _ in range(UPDATES):
            model(torch.randn(8, 3, SIDE, SIDE) * 2 + 1)
    path = tmp_path / "cold.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    wanted = {}
    for name, (mean, var, weight) in sums.items():  # a weighted mean of what was seen, and of nothing else
        wanted |= {f"{name}.running_mean": mean / weight, f"{name}.running_var": var / weight}
    return path, wanted


def test_the_initial_share_is_taken_out_exactly(tmp_path: Path, cold, capsys):
    path, wanted = cold
    out = tmp_path / "mended.safetensors"
    assert [one.check for one in inspect(path, 0.1).errors] == ["initial-statistics"]
    assert main(["repair", str(path), "--out", str(out), "--momentum", "0.1"]) == 0
    mended = load_file(out)
    for name, values in wanted.items():
        # float32 statistics: 15 rounded updates, and the start's share of 0.2 divides by 0.8
        np.testing.assert_allclose(mended[name].double(), values, rtol=15 * 2**-23, atol=15 * 2**-23)
    assert "20.59% taken out" in capsys.readouterr().out
    assert inspect(out, 0.1).errors == ()


def test_the_old_statistics_are_kept_and_all_else_is_as_it_was(tmp_path: Path, cold):
    path, wanted = cold
    out = tmp_path / "mended.safetensors"
    main(["repair", str(path), "--out", str(out), "--momentum", "0.1"])
    before, after, aside = load_file(path), load_file(out), load_file(tmp_path / "mended.before.safetensors")
    assert set(aside) == set(wanted)
    for name, tensor in before.items():
        if name in wanted:
            np.testing.assert_array_equal(aside[name].float(), tensor)
        else:
            assert torch.equal(after[name], tensor)


def test_a_momentum_that_the_numbers_contradict_is_refused(tmp_path: Path, cold, capsys):
    path, _ = cold
    assert main(["repair", str(path), "--out", str(tmp_path / "x.safetensors"), "--momentum", "0.001"]) == 1
    assert "cannot hold an initial share" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [([], 1, "--momentum"), (["--momentum", "0.1", "--data", "."], 2, "--network PACKAGE.MODULE:FUNCTION")],
)
def test_what_cannot_be_mended_is_said(tmp_path: Path, cold, capsys, arguments, code: int, words: str):
    path, _ = cold
    assert main(["repair", str(path), "--out", str(tmp_path / "x.safetensors"), *arguments]) == code
    assert words in capsys.readouterr().err


def test_a_file_that_exists_is_not_written_over(cold, capsys):
    path, _ = cold
    assert main(["repair", str(path), "--out", str(path), "--momentum", "0.1"]) == 2
    assert "exists" in capsys.readouterr().err


def test_an_onnx_file_is_mended_with_the_number_of_updates(tmp_path: Path):
    share = 0.9**5
    graph = Graph()
    true = {name: graph.weights()[name] for name in ("mean", "var")}
    graph.values = {"mean": true["mean"] * (1 - share), "var": true["var"] * (1 - share) + share}
    path, out = graph.write(tmp_path), tmp_path / "mended.onnx"
    assert main(["repair", str(path), "--out", str(out), "--momentum", "0.1", "--updates", "5"]) == 0
    (layer,) = read_subject(out).layers
    np.testing.assert_allclose(layer.running_mean, true["mean"], rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, true["var"], rtol=1e-5)


def test_statistics_gathered_from_images_are_those_of_the_population(tmp_path: Path):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (20, SIDE, SIDE, 3), np.uint8)
    (tmp_path / "data").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "data" / f"{index:02}.png")
    model = network()
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            norm.running_mean.fill_(5)
    path, out = torch_export(model, tmp_path / "bad.onnx", dynamo=False), tmp_path / "good.onnx"
    assert main(["repair", str(path), "--out", str(out), "--data", str(tmp_path / "data"), "--mean", "0.5"]) == 0
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2) / 255 - 0.5)
    model.double()
    with torch.no_grad():
        first = model.conv1(images)
        normed = torch.nn.functional.batch_norm(first, None, None, model.bn1.weight, model.bn1.bias, True)
        second = model.conv2(torch.relu(normed))
    for layer, features in zip(read_subject(out).layers, (first, second), strict=True):
        np.testing.assert_allclose(layer.running_mean, features.mean((0, 2, 3)), atol=1e-5)
        np.testing.assert_allclose(layer.running_var, features.var((0, 2, 3), unbiased=False), rtol=1e-5)
    assert len(onnx.load(out).graph.node) == len(onnx.load(path).graph.node)
