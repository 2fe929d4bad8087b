"""What is in the image, by the engine's own account, and that it runs with as little as is promised."""

import json
import shutil
import uuid

import pytest
from containers import ROOT
from e2e_support import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.compose, pytest.mark.timeout(900)]

SHELLS = ("/bin/sh", "/bin/bash", "/bin/dash")
LARGEST_BYTES = 450_000_000
COPIED = ("Dockerfile", ".dockerignore", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def described(docker, cpu_image):
    return json.loads(docker.run("image", "inspect", cpu_image))[0]


@pytest.fixture
def container(docker):
    """Start containers that are gone when the test is; return the name of each."""
    names = []

    def starting(*words: str) -> str:
        names.append(docker.run("run", "--detach", *words))
        return names[-1]

    yield starting
    for name in names:
        docker.run("rm", "--force", "--volumes", name)


def test_it_is_at_most_450_megabytes(described):
    assert described["Size"] <= LARGEST_BYTES


def test_its_labels_say_what_it_is_and_under_which_licence(described):
    labels = described["Config"]["Labels"]

    assert labels["org.opencontainers.image.title"] == "foldserve"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.base.name"].startswith("python:3.11-slim")
    assert labels["org.opencontainers.image.description"]


def test_it_ends_by_sigterm_as_nobody_and_no_shell_takes_part(described):
    config = described["Config"]

    assert config["StopSignal"] == "SIGTERM"
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["foldserve"]
    assert config["Cmd"] == ["serve"]
    assert config["Healthcheck"]["Test"][:2] == ["CMD", "python"]
    assert "/readyz" in config["Healthcheck"]["Test"][-1]
    assert list(config["ExposedPorts"]) == ["8000/tcp"]


def test_it_has_no_torch_and_nothing_of_the_repository_but_the_package_and_one_model(docker, cpu_image):
    code = """
import importlib.util, json, os
found = {name for name in ("torch", "pytest", "pip") if importlib.util.find_spec(name)}
files = sorted(os.path.join(at, name) for at, _, names in os.walk("/models") for name in names)
print(json.dumps({"found": sorted(found), "models": files, "src": os.path.exists("/src")}))
"""
    told = json.loads(docker.run("run", "--rm", "--entrypoint", "/opt/foldserve/bin/python", cpu_image, "-c", code))

    assert told["found"] == []
    assert {path.rpartition("/")[0] for path in told["models"]} == {"/models/mnist/1"}
    assert told["src"] is False


def test_it_is_healthy_while_it_is_ready_without_a_shell_on_a_file_system_that_is_only_read(
    docker, cpu_image, container
):
    hidden = [f"--volume=/dev/null:{shell}:ro" for shell in SHELLS]
    often = ("--health-interval=1s", "--health-timeout=1s", "--health-retries=1")
    name = container("--read-only", "--tmpfs=/tmp", "--volume=/state", "--cap-drop=ALL", *often, *hidden, cpu_image)
    wait_for(lambda: health(docker, name) == "healthy", "it is healthy", within_s=60)
    assert docker.tried("exec", name, "/bin/sh", "-c", "true").status != 0, "the shell was there after all"

    docker.run("kill", "--signal", "STOP", name)
    wait_for(lambda: health(docker, name) == "unhealthy", "it is noticed", within_s=60)
    docker.run("kill", "--signal", "CONT", name)
    docker.run("stop", "--time", "40", name)
    assert docker.run("inspect", "--format", "{{.State.ExitCode}}", name) == "0"


def test_a_change_of_code_installs_nothing_anew(docker, cpu_image, tmp_path):
    for name in ("foldserve", "service", "training", "models/mnist/1"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*COPIED, "deploy/requirements.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    with (tmp_path / "service/__init__.py").open("a") as file:
        file.write(f"\n# {uuid.uuid4()}\n")  # an engine that has built this test's image before may not know it
    said = docker.run("build", "--progress", "plain", "--target", "cpu", "--tag", "foldserve:changed", str(tmp_path))
    docker.run("image", "rm", "foldserve:changed")

    steps = {line.partition(" ")[0]: line for line in said.splitlines() if "[" in line and "/" in line}
    done = {step for step in steps if f"{step} CACHED" in said}
    installing = {step for step, line in steps.items() if "[dependencies-cpu" in line}
    copying = {step for step, line in steps.items() if "COPY service" in line}
    assert installing
    assert installing <= done
    assert copying
    assert not copying & done


def health(docker, name: str) -> str:
    return docker.run("inspect", "--format", "{{.State.Health.Status}}", name)
