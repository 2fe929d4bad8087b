"""BatchNorm that the graph of a checkpoint does not reach: of other domains, of heads that only training runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_support import SIDE, Graph, build_for_two_domains, build_with_auxiliary_head
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from training_support import aged

from foldserve.cli import main


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for level in range(20, 180, 20):
        Image.effect_noise((SIDE, SIDE), level).convert("RGB").save(folder / f"{level}.png")
    return folder


def saved(build: Callable[[], nn.Module], damaged: str, folder: Path) -> tuple[Path, list[str]]:
    """Write a checkpoint with a NaN in one running mean; return it and the flags that name its network."""
    state = aged(build()).state_dict()
    state[damaged][0] = torch.nan
    torch.save(state, folder / "network.pt")
    return folder / "network.pt", ["--network", f"foreign_support:{build.__name__}", "--size", str(SIDE)]


def test_images_do_not_hide_errors_of_layers_that_the_graph_never_calls(tmp_path: Path, images: Path, capsys):
    path, flags = saved(build_with_auxiliary_head, "auxiliary.running_mean", tmp_path)
    assert main(["inspect", str(path), "--data", str(images), "--json", *flags]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == 3
    assert {"auxiliary"} in [set(one["where"]) for one in report["findings"] if one["check"] == "not-finite"]
    assert {one["layer"] for one in report["data"]["drift"]} == {"bn1", "bn2"}


def test_a_repair_from_images_names_the_layers_that_it_leaves_as_they_are(tmp_path: Path, images: Path, capsys):
    path, flags = saved(build_with_auxiliary_head, "bn2.running_mean", tmp_path)
    out = tmp_path / "mended.safetensors"
    assert main(["repair", str(path), "--out", str(out), "--data", str(images), *flags]) == 0
    assert "never calls auxiliary" in capsys.readouterr().out
    old, new = torch.load(path, weights_only=True), load_file(out)
    assert torch.isfinite(new["bn2.running_mean"]).all()
    assert torch.equal(new["auxiliary.running_var"], old["auxiliary.running_var"])


@pytest.mark.parametrize("command", ["inspect", "repair"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "each of day, night of its own; name whose the images are: --domain NAME"),
        (["--domain", "noon"], "no BatchNorm for --domain noon; there are day, night"),
    ],
)
def test_images_of_nobody_knows_which_domain_are_refused(
    tmp_path: Path, images: Path, capsys, command: str, flags: list[str], words: str
):
    path, network = saved(build_for_two_domains, "bn1.domains.night.running_mean", tmp_path)
    out = ["--out", str(tmp_path / "mended.safetensors")] if command == "repair" else []
    assert main([command, str(path), *out, "--data", str(images), *network, *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "mended.safetensors").exists()


def test_images_run_through_the_batchnorm_of_the_domain_that_is_named(tmp_path: Path, images: Path, capsys):
    path, flags = saved(build_for_two_domains, "bn1.domains.night.running_mean", tmp_path)
    for domain in ("day", "night"):
        main(["inspect", str(path), "--data", str(images), "--json", *flags, "--domain", domain])
        report = json.loads(capsys.readouterr().out)
        assert {one["layer"] for one in report["data"]["drift"]} == {f"bn{at}.domains.{domain}" for at in (1, 2)}
        (damaged,) = [one["where"] for one in report["findings"] if one["check"] == "not-finite"]
        assert damaged == ["bn1.domains.night"], "every domain's numbers are looked at, whoever runs"


def test_a_repair_from_images_mends_the_domain_that_is_named_alone(tmp_path: Path, images: Path, capsys):
    path, flags = saved(build_for_two_domains, "bn1.domains.night.running_mean", tmp_path)
    out = tmp_path / "mended.safetensors"
    arguments = ["repair", str(path), "--out", str(out), "--data", str(images), *flags, "--domain", "night"]
    assert main(arguments) == 0
    assert "never calls bn1.domains.day, bn2.domains.day" in capsys.readouterr().out
    old, new = torch.load(path, weights_only=True), load_file(out)
    assert torch.isfinite(new["bn1.domains.night.running_mean"]).all()
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        f"bn{at}.domains.night.running_{word}" for at in (1, 2) for word in ("mean", "var")
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--domain", "day"], "--domain says whose the images of --data are"),
        (["--domain", "day", "--data", "."], "has one BatchNorm for all images; leave out --domain day"),
    ],
)
def test_a_domain_where_it_means_nothing_is_refused(tmp_path: Path, capsys, flags: list[str], words: str):
    path, network = saved(build_with_auxiliary_head, "bn2.running_mean", tmp_path)
    assert main(["inspect", str(path), *network, *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inspect"], ["repair", "--out", "mended.safetensors"]], ids=["inspect", "repair"])
def test_where_data_sets_lie_is_refused_without_images(tmp_path: Path, capsys, command: list[str]):
    path, network = saved(build_with_auxiliary_head, "bn2.running_mean", tmp_path)
    assert main([*command, str(path), *network, "--data-dir", "."]) == 2
    assert "--data-dir says where a run's data sets lie" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--domain", "day"], ["--data-dir", "."], ["--network", "a:b"]])
def test_what_tells_of_a_network_is_refused_for_a_file_that_is_a_graph(
    tmp_path: Path, images: Path, capsys, flags: list[str]
):
    assert main(["inspect", str(Graph().write(tmp_path)), "--data", str(images), *flags]) == 2
    assert f"has its own graph; {flags[0]} is for checkpoints and run folders" in capsys.readouterr().err


def test_without_images_every_domain_is_examined(tmp_path: Path, capsys):
    path, _ = saved(build_for_two_domains, "bn1.domains.night.running_mean", tmp_path)
    assert main(["inspect", str(path)]) == 1
    assert "bn1.domains.night" in capsys.readouterr().out
