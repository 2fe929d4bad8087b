"""`foldserve inspect --data`: drift, preprocessing and accuracy, each with statistics that fit and that do not."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_support import CLASSES, SIDE, Network, torch_export
from PIL import Image

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


def test_the_page_draws_the_worst_channels(tmp_path: Path, trained, data: Path):
    path = torch_export(trained, tmp_path / "good.onnx", dynamo=False)
    page = tmp_path / "page.html"
    assert main(["inspect", str(path), "--data", str(data), *RIGHT, "--html", str(page)]) == 0
    assert "worst channels" in page.read_text()
