"""`foldserve repair`: what it takes out is exactly what was left of the start; what it gathers is the population."""

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from foreign_support import CLASSES, SIDE, Graph, Network, network, torch_export
from PIL import Image
from safetensors.torch import load_file, save_file
from training_support import QUICK

from foldserve.cli import main
from training.checkpoint import Facts, save_checkpoint
from training.doctor.examine import inspect
from training.doctor.mending import is_worse
from training.doctor.read import read_subject

STATE = ".safetensors"
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


@pytest.mark.parametrize(
    ("kind", "wanted"), [("onnx", ".safetensors"), ("pt", ".safetensors"), ("safetensors", ".onnx")]
)
def test_a_new_file_does_not_bear_the_name_of_another_kind(tmp_path: Path, cold, capsys, kind: str, wanted: str):
    path = Graph().write(tmp_path) if wanted == ".onnx" else cold[0]
    out = tmp_path / f"mended.{kind}"
    assert main(["repair", str(path), "--out", str(out), "--momentum", "0.1", "--updates", "9"]) == 2
    assert f"is repaired as {wanted}" in capsys.readouterr().err
    assert not out.exists()


def test_a_graph_in_training_mode_is_not_repaired(tmp_path: Path, capsys):
    path = Graph(training_mode=True).write(tmp_path)
    out = tmp_path / "mended.onnx"
    assert main(["repair", str(path), "--out", str(out), "--momentum", "0.1", "--updates", "9"]) == 1
    assert "norm in training mode, which reads no running statistics" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("updates", ["-3", "0", "many"])
def test_a_number_of_updates_that_cannot_be_is_wrong_usage(tmp_path: Path, capsys, updates: str):
    with pytest.raises(SystemExit) as stop:
        main(["repair", "x.onnx", "--out", str(tmp_path / "y.onnx"), "--momentum", "0.1", "--updates", updates])
    assert stop.value.code == 2
    assert "expected the number of training batches, 1 or more" in capsys.readouterr().err


def test_old_statistics_that_were_kept_before_are_not_written_over(tmp_path: Path, cold, capsys):
    path, _ = cold
    (tmp_path / "mended.before.safetensors").write_bytes(b"kept")
    assert main(["repair", str(path), "--out", str(tmp_path / "mended.onnx"), "--momentum", "0.1"]) == 2
    assert "mended.before.safetensors exists" in capsys.readouterr().err
    assert (tmp_path / "mended.before.safetensors").read_bytes() == b"kept"
    assert not (tmp_path / "mended.onnx").exists()


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


def classes_by_brightness(folder: Path, count: int) -> Path:
    """Write images of four classes that differ in brightness, in a folder for each."""
    random = np.random.default_rng(0)
    for index in range(count):
        target = index % CLASSES
        (folder / str(target)).mkdir(parents=True, exist_ok=True)
        image = random.normal(40 + 50 * target, 10, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / str(target) / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of images, and the trainable parameters alone of a network that tells them apart."""
    folder = tmp_path_factory.mktemp("repair")
    data = classes_by_brightness(folder / "data", 80)
    pixels = np.stack([np.array(Image.open(path)) for path in sorted(data.rglob("*.png"))])
    targets = torch.tensor([int(path.parent.name) for path in sorted(data.rglob("*.png"))])
    images = torch.from_numpy(pixels / 255).float().permute(0, 3, 1, 2)
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(80):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
    path = folder / "parameters.pt"
    torch.save(dict(model.named_parameters()), path)
    return data, path


NETWORK = ["--network", "foreign_support:build_network", "--size", str(SIDE)]


def test_a_checkpoint_without_statistics_gets_them_from_images_and_labels_again(tmp_path: Path, learnt, capsys):
    data, path = learnt
    out = tmp_path / "mended.safetensors"
    assert [one.check for one in inspect(path).errors] == ["statistics-missing"]
    assert main(["repair", str(path), "--out", str(out), "--data", str(data), *NETWORK]) == 0
    told = re.search(r"accuracy on 40 other images: ([\d.]+)% before, ([\d.]+)% after", capsys.readouterr().out)
    assert told is not None
    before, after = float(told[1]), float(told[2])
    assert before <= 50
    assert after >= 95
    assert inspect(out).errors == ()
    assert set(load_file(out)) == set(Network().state_dict())


def test_statistics_that_label_worse_are_not_written(tmp_path: Path, learnt, capsys):
    data, path = learnt
    good, worse = tmp_path / "good.safetensors", tmp_path / "worse.safetensors"
    assert main(["repair", str(path), "--out", str(good), "--data", str(data), *NETWORK]) == 0
    swapped = tmp_path / "swapped"  # the folders' names are the classes, so these are all wrong after a right repair
    for index, folder in enumerate(sorted(data.iterdir())):
        shutil.copytree(folder, swapped / f"{(index + 1) % CLASSES}")
    state = load_file(good)
    state["bn2.running_mean"] += 1e3  # every ReLU behind it is dead, and the one class that is left is right by chance
    save_file(state, tmp_path / "dead.safetensors")
    capsys.readouterr()
    arguments = ["repair", str(tmp_path / "dead.safetensors"), "--out", str(worse), "--data", str(swapped), *NETWORK]
    assert main(arguments) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not worse.exists()


@pytest.mark.parametrize(
    ("lost", "images", "is_refused"), [(3, 32, False), (4, 32, True), (20, 1000, False), (21, 1000, True)]
)
def test_new_statistics_may_cost_three_images_or_one_in_fifty(lost: int, images: int, is_refused: bool):
    assert is_worse(0.9, 0.9 - lost / images, images) == is_refused


def test_a_network_tells_the_momentum_that_an_exact_repair_needs(tmp_path: Path, cold):
    path, wanted = cold
    out = tmp_path / "mended.safetensors"
    assert main(["repair", str(path), "--out", str(out), "--network", "foreign_support:build_network"]) == 0
    mended = load_file(out)
    for name, values in wanted.items():
        np.testing.assert_allclose(mended[name].double(), values, rtol=15 * 2**-23, atol=15 * 2**-23)


@pytest.mark.parametrize("statistics", ["raw", "corrected", "population"])
def test_a_checkpoint_that_says_its_statistics_are_corrected_is_not_corrected_twice(
    tmp_path: Path, capsys, statistics: str
):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4, momentum=0.1)).train()
    for _ in range(UPDATES):
        model(torch.randn(8, 3, SIDE, SIDE) * 2 + 1)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(QUICK.to_json())
    facts = Facts(1, 0.5, 1, 0.5, 0.5, 1.0, statistics=statistics)
    save_checkpoint(run / "best.safetensors", model, facts)
    for report in (inspect(run), inspect(run / "best.safetensors", 0.1)):
        assert [one.check for one in report.errors] == (["initial-statistics"] if statistics == "raw" else [])
    assert main(["inspect", str(run / "best.safetensors")]) in {0, 1}
    assert ("momentum unknown" in capsys.readouterr().out) == (statistics == "raw")
    out = tmp_path / "mended.safetensors"
    assert main(["repair", str(run / "best.safetensors"), "--out", str(out), "--momentum", "0.1"]) == 0
    is_same = torch.equal(load_file(out)["1.running_var"], model[1].running_var)
    assert is_same == (statistics != "raw")
