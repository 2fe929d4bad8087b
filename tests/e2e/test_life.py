"""How a process begins and ends: a rehearsal, a grace, a second signal, an engine that hangs or fails at everything."""

import signal
import subprocess
import sys
import time

import httpx
import pytest
from containers import ROOT
from e2e_support import get, post
from PIL import Image
from support import TinyModel, encode, random_pixels

pytestmark = pytest.mark.e2e

IMAGE = encode(Image.fromarray(random_pixels(1, seed=5)[0]), "PNG")
BLACK = encode(Image.new("RGB", (8, 8)), "PNG")
GRACE_S = 3
WORKERS = pytest.mark.parametrize("workers", ["1", "2"])


@WORKERS
def test_after_sigterm_it_is_not_ready_at_once_and_still_answers_for_the_grace(start, models, workers):
    server = start("--models", str(models), "--workers", workers, "--grace-s", str(GRACE_S))
    with httpx.Client(base_url=server.url, timeout=30) as kept:
        assert kept.get("/readyz").status_code == 200
        signalled = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.poll(lambda: get(f"{server.url}/readyz").status_code == 503, "it is not ready", within_s=GRACE_S)
        answers = [kept.post("/predict", content=IMAGE)]
        while "connection" not in answers[-1].headers:
            assert workers == "2", "what is told to one process counts at once"
            assert time.monotonic() - signalled < GRACE_S, "who keeps a connection learns to go elsewhere"
            answers.append(kept.post("/predict", content=IMAGE))
        assert get(f"{server.url}/healthz").status_code == 200
    assert {answer.status_code for answer in answers} == {200}
    assert answers[-1].headers["connection"] == "close"
    assert server.process.wait(20) == 0
    assert GRACE_S <= time.monotonic() - signalled < 20


@WORKERS
def test_a_second_signal_ends_it_at_once(start, models, workers):
    server = start("--models", str(models), "--workers", workers, "--grace-s", "100")
    server.process.send_signal(signal.SIGTERM)
    server.poll(lambda: "not ready any more" in server.said(), "the first signal is taken")
    server.process.send_signal(signal.SIGTERM)

    assert server.process.wait(5) == 1
    assert "second signal" in server.said()


# The command with an engine that hangs on a black image, or fails at everything from the first black image on.
FAULTY = """
import sys, threading
from service.engine import OnnxEngine

run, seen, fault = OnnxEngine.run, [], {fault!r}

def run_or_not(self, images, threads=1):
    if not images.any() and threading.current_thread().name.startswith("lane"):
        print("black", flush=True)
        seen.append(1)
    if seen and fault == "hangs":
        threading.Event().wait()
    if seen and fault == "no memory":
        raise MemoryError
    if seen and fault == "fails":
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")
    return run(self, images, threads)

OnnxEngine.run = run_or_not
"""
ONE_PROCESS = "from foldserve.cli import main; sys.exit(main(sys.argv[1:]))"
FAULTS = {
    "hangs": "a run of model tiny hangs",
    "fails": "fails even on its golden image",
    "no memory": "fails even on its golden image",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_is_lost_is_reported_and_ends_the_process_with_a_reason(start, models, fault):
    program = ("-c", FAULTY.format(fault=fault) + ONE_PROCESS)
    flags = ("--mode", "off", "--run-timeout-s", "3", "--request-timeout-s", "5")
    server = start("--models", str(models), *flags, program=program)
    assert post(server.url, IMAGE).status_code == 200

    assert post(server.url, BLACK).status_code in {500, 504}
    assert server.process.wait(20) == 1
    assert FAULTS[fault] in server.said()


def test_a_rehearsal_asks_the_canary_and_the_shadow_too(tmp_path):
    for version in (1, 2, 3):
        TinyModel(seed=version).write(tmp_path, version)
    (tmp_path / "tiny" / "serving.json").write_text('{"stable": 1, "canary": 2, "shadow": 3}')

    done = rehearse("--models", str(tmp_path))

    assert done.returncode == 0
    assert [line.split(" on ")[0] for line in done.stdout.splitlines()] == [f"tiny version {one}" for one in (1, 2, 3)]


def rehearse(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "foldserve", "serve", "--dry-run", "--device", "cpu", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_dry_run_answers_the_golden_images_and_exits_with_0(models):
    done = rehearse("--models", str(models))

    assert done.returncode == 0, done.stderr
    assert "tiny version 1 on cpu: 8 of 8 golden images right" in done.stdout
    assert "certificate none" not in done.stdout


def test_a_dry_run_holds_an_exact_form_to_the_answers_of_its_integers():
    done = rehearse("--models", str(ROOT / "models"), "--form", "exact")

    assert done.returncode == 0, done.stderr
    assert "mnist version 1 on cpu: 16 of 16 golden images right" in done.stdout


def test_a_dry_run_of_a_model_that_would_be_refused_exits_with_1_and_the_reason(tmp_path):
    folder = TinyModel().write(tmp_path)
    (folder / "golden.npz").unlink()
    done = rehearse("--models", str(tmp_path))

    assert done.returncode == 1
    assert "golden.npz is missing" in done.stderr
    assert "Traceback" not in done.stderr
