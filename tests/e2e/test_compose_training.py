"""The profile `train`: one shot into the volume, whereupon the service that runs serves what came out."""

import json
import os
from pathlib import Path

import httpx
import pytest
from e2e_support import wait_for
from PIL import Image
from support import encode

pytestmark = [pytest.mark.e2e, pytest.mark.compose, pytest.mark.timeout(900)]

SHORT = {
    "train": {"command": ["train", "digits", "--out", "/runs/digits", "--overwrite", "--set", "epochs=2"]},
    "export": {"command": ["export", "/runs/digits", "--name", "digits", "--exact", "off"]},
}
GRAY = encode(Image.new("L", (8, 8), 128), "PNG")
NOT_TESTED = (
    "NOT TESTED: the image train, for torch with CUDA has gigabytes; name a folder that holds a wheel of torch "
)
NOT_TESTED += "for CPUs in PIP_FIND_LINKS, or build it first: make image TARGET=train"


@pytest.fixture
def trainer(docker, cpu_image, project, tmp_path):
    """A project whose training is short, with the image `train` built of a torch without CUDA."""
    wheels = Path(os.environ.get("PIP_FIND_LINKS", ""))
    if any(wheels.glob("torch-*+cpu-*.whl")):
        docker.build("train", "--build-context", f"wheels={wheels}")
    elif not docker.has("foldserve:train"):
        pytest.skip(NOT_TESTED)
    (tmp_path / "short.yml").write_text(json.dumps({"services": SHORT}))
    return project("training", tmp_path / "short.yml", PUBLISH="127.0.0.1:0")


def served(url: str) -> dict[str, int]:
    models = httpx.get(f"{url}/info", timeout=30).json()["models"]
    return {name: one["version"] for name, one in models.items()}


def test_what_the_profile_trains_is_served_without_a_restart(trainer, docker):
    trainer.run("up", "--detach", "--wait", "foldserve")
    assert served(trainer.url()) == {"mnist": 1}

    trainer.run("--profile", "train", "run", "--rm", "--no-TTY", "export")
    wait_for(lambda: served(trainer.url()) == {"mnist": 1, "digits": 1}, "the new model is served", within_s=60)
    answer = httpx.post(f"{trainer.url()}/predict?model=digits", content=GRAY, timeout=30).json()
    assert answer["version"] == 1
    assert answer["predictions"][0]["label"] in set("0123456789")
    (container,) = trainer.containers("foldserve")
    assert docker.run("inspect", "--format", "{{.RestartCount}}", container) == "0"

    listing = ("--entrypoint", "python", "foldserve:train", "-c", "import os; print(os.listdir('/models'))")
    assert docker.run("run", "--rm", *listing) == "['mnist']", "a volume that training fills first has the demo, too"
    read_only = ("--volume=foldserve-training_runs:/runs:ro", "--volume=foldserve-training_models:/models:ro")
    said = docker.tried("run", "--rm", *read_only, "foldserve:train", "export", "/runs/digits", "--name", "digits")
    assert said.status == 1
    assert "/models/digits cannot be written by user 10001" in said.text
    assert "folded against" not in said.text, "told before the work"


def test_the_committed_files_train_and_export_what_the_preset_says(docker, project):
    told = json.loads(project("told").run("--profile", "train", "config", "--format", "json"))["services"]

    assert told["train"]["command"][:2] == ["train", "digits"]
    assert told["export"]["command"] == ["export", "/runs/digits", "--name", "digits"]
    assert told["export"]["depends_on"]["train"]["condition"] == "service_completed_successfully"
