"""`foldserve inspect --data`: drift, preprocessing and accuracy, each with statistics that fit and that do not."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_support import CLASSES, SIDE, Network, torch_export
from PIL import Image
from training_support import quick_trained

from foldserve.cli import main

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOURS = ((230, 60, 20), (200, 130, 40), (240, 20, 70), (150, 90, 10))  # all warm, so that the order tells


def photos() -> tuple[np.ndarray, np.ndarray]:
    """Return coloured noise, one colour for each class: 64 images and their classes."""
    random = np.random.default_rng(0)
    targets = np.arange(64) % CLASSES
    noise = random.normal(0, 30, (64, SIDE, SIDE, 3))
    return (np.array(COLOURS)[targets][:, None, None] + noise).clip(0, 255).astype(np.uint8), targets


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index, (image, target) in enumerate(zip(*photos(), strict=True)):
        (folder / str(target)).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / str(target) / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def trained() -> Network:
    """A network that learnt these colours, in RGB with ImageNet's mean and deviation."""
    torch.manual_seed(0)
    model = Network()
    pixels, targets = photos()
    images = (torch.from_numpy(pixels / 255).float() - torch.tensor(MEAN)) / torch.tensor(STD)
    images, wanted = images.permute(0, 3, 1, 2), torch.from_numpy(targets)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), wanted).backward()
        optimizer.step()
    with torch.no_grad():  # the weights have settled, and now the statistics too
        for _ in range(50):
            model(images)
    return model.eval()


@pytest.fixture(scope="module")
def trained_run(base: Path) -> dict[str, np.ndarray]:
    """Images of the run's own data, 64 of them."""
    split = quick_trained(base).dataset.test
    return {"images": split.images[:64], "targets": split.targets[:64]}


def checks(capsys, path: Path, data: Path, *flags: str) -> tuple[dict[str, str], dict]:
    main(["inspect", str(path), "--data", str(data), "--json", *flags])
    report = json.loads(capsys.readouterr().out)
    return {one["check"]: one["observed"] for one in report["findings"]}, report["data"]


RIGHT = ["--mean", *map(str, MEAN), "--std", *map(str, STD)]


def test_the_right_preprocessing_and_statistics_are_healthy(tmp_path: Path, trained, data: Path, capsys):
    path = torch_export(trained, tmp_path / "good.onnx", dynamo=False)
    found, seen = checks(capsys, path, data, *RIGHT)
    assert not {"drift", "preprocessing", "accuracy"} & set(found)
    assert seen["accuracy"]["running"] == 1
    assert all(one["far"] == 0 for one in seen["drift"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "ImageNet's mean and deviation, RGB"),
        (["--mean", "0", "--std", "0.00392157"], "ImageNet's mean and deviation, RGB"),
    ],
    ids=["0–1", "0–255"],
)
def test_another_scaling_is_told_by_the_first_batchnorm(tmp_path: Path, trained, data: Path, capsys, flags, words):
    path = torch_export(trained, tmp_path / "good.onnx", dynamo=False)
    found, _ = checks(capsys, path, data, *flags)
    assert words in found["preprocessing"]


def test_colours_in_the_other_order_are_told_by_the_first_batchnorm(tmp_path: Path, trained, data: Path, capsys):
    turned = tmp_path / "bgr"
    for path in data.rglob("*.png"):
        target = turned / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(np.array(Image.open(path))[..., ::-1])).save(target)
    path = torch_export(trained, tmp_path / "good.onnx", dynamo=False)
    found, _ = checks(capsys, path, turned, *RIGHT)
    assert "BGR" in found["preprocessing"]


def test_statistics_that_left_their_weights_show_drift_and_cost_accuracy(tmp_path: Path, trained, data: Path, capsys):
    bad = copy.deepcopy(trained)
    with torch.no_grad():
        bad.bn2.running_mean.fill_(50)  # every ReLU behind it is dead
    path = torch_export(bad, tmp_path / "bad.onnx", dynamo=False)
    found, seen = checks(capsys, path, data, *RIGHT)
    assert {"drift", "accuracy"} <= set(found)
    assert seen["accuracy"]["batch"] == 1
    assert [one["far"] for one in seen["drift"]] == sorted((one["far"] for one in seen["drift"]), reverse=True)


def saved(model: Network, path: Path) -> Path:
    torch.save({"state_dict": model.state_dict(), "epoch": 60}, path)
    return path


NETWORK = ["--network", "foreign_support:build_network", "--size", str(SIDE)]


def test_a_checkpoint_with_its_network_shows_what_its_export_shows(tmp_path: Path, trained, data: Path, capsys):
    bad = copy.deepcopy(trained)
    with torch.no_grad():
        bad.bn2.running_mean.fill_(50)
    exported = torch_export(bad, tmp_path / "bad.onnx", dynamo=False)
    wanted, by_graph = checks(capsys, exported, data, *RIGHT)
    found, by_network = checks(capsys, saved(bad, tmp_path / "bad.pt"), data, *RIGHT, *NETWORK)
    assert {"drift", "accuracy"} <= set(found)
    assert found["accuracy"] == wanted["accuracy"]
    assert {one["layer"] for one in by_network["drift"]} == {"bn1", "bn2"}
    assert [one["far"] for one in by_network["drift"]] == [one["far"] for one in by_graph["drift"]]


def test_a_run_folder_knows_its_network_and_its_preprocessing(tmp_path: Path, finished_run: Path, trained_run, capsys):
    for index, (image, target) in enumerate(zip(*(trained_run[name] for name in ("images", "targets")), strict=True)):
        (tmp_path / str(target)).mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(tmp_path / str(target) / f"{index:02}.png")
    found, seen = checks(capsys, finished_run, tmp_path)
    assert not {"drift", "preprocessing", "accuracy"} & set(found)
    assert seen["accuracy"]["running"] > 0.8
    assert len(seen["drift"]) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--data", "."], "--network PACKAGE.MODULE:FUNCTION"), (["--network", "foreign_support:nobody"], "nobody")],
)
def test_a_network_that_is_not_named_or_not_there_is_wrong_usage(tmp_path: Path, trained, capsys, arguments, words):
    assert main(["inspect", str(saved(trained, tmp_path / "network.pt")), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_another_network_than_the_checkpoints_is_refused(tmp_path: Path, capsys):
    torch.save(torch.nn.Sequential(torch.nn.BatchNorm2d(3)).state_dict(), tmp_path / "other.pt")
    assert main(["inspect", str(tmp_path / "other.pt"), "--network", "foreign_support:build_network"]) == 1
    assert "does not fit foreign_support:build_network" in capsys.readouterr().err


def test_the_page_draws_the_worst_channels(tmp_path: Path, trained, data: Path):
    path = torch_export(trained, tmp_path / "good.onnx", dynamo=False)
    page = tmp_path / "page.html"
    assert main(["inspect", str(path), "--data", str(data), *RIGHT, "--html", str(page)]) == 0
    assert "worst channels" in page.read_text()
