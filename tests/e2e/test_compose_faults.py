"""What goes wrong with a deployment is said in one clear line, by the engine or in the container's log."""

import json
import re

import httpx
import pytest
from containers import ROOT, open_to_all
from e2e_support import wait_for
from PIL import Image
from support import encode

pytestmark = [pytest.mark.e2e, pytest.mark.compose, pytest.mark.timeout(900)]

NO_DRIVER = "device cuda cannot be had: there is no NVIDIA driver (libcuda.so.1"
GPU_WITHOUT_ITS_IMAGE = "services: {foldserve: {image: foldserve:cpu, build: {target: cpu}}}\n"
LARGE = (7000, 7000)  # within max_image_pixels; while it is decoded it takes 750 MiB


@pytest.fixture
def one(project, cpu_image):
    """A project with one service, which `run` starts with what a test gives it; nothing of it is published."""
    return project("faults", PUBLISH="127.0.0.1:0")


def rehearse(one, *flags: str, **variables: str):
    done = one.tried("run", "--rm", "--no-deps", *flags, "foldserve", "serve", "--dry-run", **variables)
    return done.returncode, done.stdout + done.stderr


def test_cuda_without_a_driver_is_refused_by_name(one):
    status, said = rehearse(one, "--env", "FOLDSERVE_DEVICE=cuda")

    assert status == 1
    assert NO_DRIVER in said
    assert "Traceback" not in said


def test_the_gpu_image_without_a_gpu_says_which_library_is_missing(docker):
    if not docker.has("foldserve:gpu"):
        pytest.skip("NOT TESTED: the image foldserve:gpu, which has 2.6 GB; `make image TARGET=gpu` builds it")
    said = docker.tried("run", "--rm", "--env", "FOLDSERVE_DEVICE=cuda", "foldserve:gpu")

    assert said.status == 1
    assert NO_DRIVER in said.text
    assert "Traceback" not in said.text


def test_the_gpu_override_without_a_container_toolkit_is_refused_by_the_engine(project, cpu_image, tmp_path):
    # The image is not what is asked here, and the one for GPUs is large.
    (tmp_path / "small.yml").write_text(GPU_WITHOUT_ITS_IMAGE)
    gpu = project("gpu", "deploy/compose.gpu.yml", tmp_path / "small.yml", PUBLISH="127.0.0.1:0")
    done = gpu.tried("up", "--detach")

    assert done.returncode != 0
    assert 'could not select device driver "nvidia" with capabilities: [[gpu]]' in done.stderr


def test_a_repository_without_models_is_refused_with_what_was_expected(one, tmp_path):
    open_to_all(tmp_path)
    status, said = rehearse(one, MODELS=str(tmp_path))

    assert status == 1
    assert "/models holds no model; expected /models/<name>/<version>/model.onnx" in said


def test_a_repository_that_cannot_be_read_is_refused_with_who_must_be_able_to(one, tmp_path):
    (tmp_path / "models").mkdir(mode=0o700)
    open_to_all(tmp_path, but=tmp_path / "models")
    status, said = rehearse(one, MODELS=str(tmp_path / "models"))

    assert status == 1
    assert "/models cannot be read (Permission denied); let user 10001 read and enter it" in said
    assert "Traceback" not in said


def test_certificates_that_cannot_be_kept_cost_a_warning_and_nothing_else(docker, cpu_image):
    said = docker.tried("run", "--rm", "--read-only", "--tmpfs=/tmp", cpu_image, "serve", "--dry-run")

    assert said.status == 0
    assert "could not be kept (Read-only file system); the next start measures again" in said.text


def test_a_port_of_the_host_that_is_taken_is_told_by_the_engine(one, project):
    one.run("up", "--detach")
    (container,) = one.containers("foldserve")
    port = one.docker("port", container, "8000/tcp")
    second = project("faults-2", PUBLISH=port).tried("up", "--detach")

    assert second.returncode != 0
    assert f"Bind for {port} failed: port is already allocated" in second.stderr


def test_a_port_that_is_taken_in_the_containers_network_is_told_by_the_service(docker, one, cpu_image):
    one.run("up", "--detach", "--wait")
    (container,) = one.containers("foldserve")
    said = docker.tried("run", "--rm", f"--network=container:{container}", cpu_image)

    assert said.status == 1
    assert re.search(r"foldserve: .*8000.*in use", said.text)
    assert "Traceback" not in said.text


def test_a_memory_limit_under_which_nothing_comes_up_is_told_before_the_kernel_ends_it(one):
    status, said = rehearse(one, MEMORY="48m")

    assert status == 137
    assert "the memory limit of 48 MiB is too low: 96 MiB are needed" in said


def test_a_memory_limit_that_requests_could_break_is_told_with_the_one_that_holds(one):
    status, said = rehearse(one, MEMORY="300m")

    assert status == 0
    assert re.search(r"the memory limit of 300 MiB is low: \d+ MiB are in use", said)
    assert re.search(r"raise it to \d{4} MiB", said)


def test_a_worker_that_the_kernel_ends_for_its_memory_is_told_with_the_cause(one):
    started = one.tried("up", "--detach", "--wait", MEMORY="300m", WORKERS="2")
    assert started.returncode == 0, started.stderr
    with pytest.raises(httpx.RemoteProtocolError):
        one.send(encode(Image.new("RGB", LARGE, (9, 8, 7)), "WEBP"))
    wait_for(lambda: "it is replaced" in one.run("logs", "foldserve"), "the death is told", within_s=60)

    said = one.run("logs", "foldserve")
    assert "was killed by SIGKILL, by the kernel, for the memory limit was reached" in said


def test_a_clock_that_is_behind_a_kept_certificate_is_told(one):
    assert rehearse(one)[0] == 0
    code = """
import json, pathlib
(path,) = pathlib.Path("/state/certificates").glob("*.json")
kept = json.loads(path.read_text())
kept["certificate"]["measured"]["created"] = "2099-01-01T00:00:00+00:00"
path.write_text(json.dumps(kept))
"""
    one.run("run", "--rm", "--entrypoint", "python", "foldserve", "-c", code)
    status, said = rehearse(one)

    assert status == 0
    assert "but its certificate was made at 2099-01-01T00:00:00+00:00: set the clock" in said


def test_threads_follow_the_quota_of_the_container(docker, cpu_image):
    told = docker.run("run", "--rm", "--cpus=1", cpu_image, "certify", "mnist", "--quick", "--json")
    fingerprint = json.loads(told[told.index("{") :])["fingerprint"]

    assert fingerprint["threads"] == {"cores": 1, "quota": "1"}
    assert {threads for _, threads in fingerprint["candidates"]} == {1}


def test_keys_are_asked_for_a_revoked_one_opens_nothing_and_a_file_that_cannot_be_read_is_told(
    project, cpu_image, docker, tmp_path
):
    folder = tmp_path / "keys"
    folder.mkdir()
    open_to_all(folder)
    make = ("run", "--rm", "--user=0", "--entrypoint=foldserve", f"--volume={folder}:/made", cpu_image, "keys")
    old = made_key(docker.run(*make, "add", "camera", "--api-keys-file", "/made/api_keys"))
    guarded = project("keys", "deploy/compose.keys.yml", PUBLISH="127.0.0.1:0", API_KEYS_FOLDER=str(folder))
    status, said = rehearse(guarded)
    assert status == 2
    assert "/keys/api_keys" in said
    assert "Permission denied" in said

    (folder / "api_keys").chmod(0o644)
    guarded.run("up", "--detach", "--wait")
    seven = (ROOT / "docs" / "seven.png").read_bytes()
    assert guarded.send(seven).status_code == 401
    assert guarded.send(seven, authorization=f"Bearer {old}").status_code == 200

    new = made_key(docker.run(*make, "add", "camera-2", "--api-keys-file", "/made/api_keys"))
    docker.run(*make, "remove", "camera", "--api-keys-file", "/made/api_keys")
    assert guarded.send(seven, authorization=f"Bearer {new}").status_code == 200
    assert guarded.send(seven, authorization=f"Bearer {old}").status_code == 401


def made_key(said: str) -> str:
    (key,) = (line for line in said.splitlines() if line.startswith("fsk_"))
    return key
