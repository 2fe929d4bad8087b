"""Exact models as their user meets them: real servers whose answers, by theorem, another machine's kernels repeat."""

import json
import subprocess
import sys

import httpx
import pytest
from e2e_support import get, post
from exact_recipes import make
from exact_service import RECIPE, write_exact
from PIL import Image
from support import encode

pytestmark = pytest.mark.e2e

GRAPH = make(RECIPE)
FILES = [encode(Image.fromarray(one), "PNG") for one in GRAPH.images]
# A server on a machine of one core, whose integer kernels saturate: what is left to it is the float twin.
ANOTHER_MACHINE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from foldserve.cli import main
from service.engine import OnnxEngine

run, init = OnnxEngine.run, OnnxEngine.__init__

def opened(self, model_bytes, *rest):
    self.saturates = b"QLinearConv" in model_bytes
    init(self, model_bytes, *rest)

def run_and_saturate(self, images, threads=1):
    logits = run(self, images, threads)
    return logits + 1 if self.saturates else logits

OnnxEngine.__init__, OnnxEngine.run = opened, run_and_saturate
sys.exit(main(sys.argv[1:]))
"""
ANOTHER = {"program": ("-c", ANOTHER_MACHINE)}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with one model of two forms; nobody writes to it."""
    folder = tmp_path_factory.mktemp("exact") / "models"
    write_exact(folder, GRAPH)
    return folder


def predictions(server, files=FILES) -> list[dict]:
    parts = [("file", ("x.png", one)) for one in files]
    answer = httpx.post(f"{server.url}/predict", params={"receipt": "true", "logits": "true"}, files=parts, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


def certificate_of(server) -> dict:
    return get(f"{server.url}/models/exact").json()["certificate"]


def verify(server, receipt: dict, image: bytes) -> httpx.Response:
    return httpx.post(
        f"{server.url}/verify", data={"receipt": json.dumps(receipt)}, files={"file": ("x", image)}, timeout=30
    )


def test_the_exact_form_is_served_and_certified_by_theorem(start, repository):
    server = start("--models", str(repository), "--form", "exact")
    answer = post(server.url, FILES[0])
    certificate = certificate_of(server)

    assert answer.json()["form"] == "exact"
    assert answer.headers["foldserve-certificate"] == get(f"{server.url}/info").json()["models"]["exact"]["certificate"]
    assert (certificate["verdict"], certificate["form"]) == ("certified", "exact")
    assert "by theorem" in certificate["reason"]
    assert "by theorem" in certificate["theorem"]["statement"]
    assert "sum products" in certificate["theorem"]["premise"]


def test_every_answer_is_the_oracle_s_alone_and_in_company(start, repository):
    server = start("--models", str(repository), "--form", "exact")
    wanted = [[float(one) for one in row] for row in GRAPH.values["logits"]]

    assert [one["logits"] for one in predictions(server)] == wanted
    assert [predictions(server, [file])[0]["logits"] for file in FILES] == wanted


def test_receipts_of_an_exact_model_hold_on_another_machine_and_back(start, repository, tmp_path):
    here = start("--models", str(repository), "--form", "exact")
    there = start("--models", str(repository), "--form", "exact", "--state", str(tmp_path / "there"), **ANOTHER)
    mine, theirs = certificate_of(here), certificate_of(there)

    assert mine["theorem"]["execution"] != theirs["theorem"]["execution"] == "twin"
    assert {one["threads"] for one in theirs["shapes"]} == {1}
    assert mine["fingerprint"] != theirs["fingerprint"]
    assert mine["answer_digest"] == theirs["answer_digest"]
    for giving, replaying in ((here, there), (there, here)):
        for image, prediction in zip(FILES, predictions(giving), strict=True):
            replay = verify(replaying, prediction["receipt"], image)
            assert replay.status_code == 200, replay.text
            assert (replay.json()["comparable"], replay.json()["same_bits"]) == (True, True)


def test_receipts_of_a_float_model_hold_on_their_own_machine_alone(start, repository, tmp_path):
    here = start("--models", str(repository), "--form", "float")
    there = start("--models", str(repository), "--form", "float", "--state", str(tmp_path / "there"), **ANOTHER)
    receipt = predictions(here, FILES[:1])[0]["receipt"]

    assert receipt["form"] == "float"
    assert "theorem" not in certificate_of(here)["reason"]
    assert verify(here, receipt, FILES[0]).json()["same_bits"] is True
    refused = verify(there, receipt, FILES[0])
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:foldserve:problem:not-comparable")


def test_a_receipt_of_one_form_is_not_comparable_with_the_other(start, repository):
    exact, plain = (start("--models", str(repository), "--form", form) for form in ("exact", "float"))

    assert verify(plain, predictions(exact, FILES[:1])[0]["receipt"], FILES[0]).status_code == 409
    assert verify(exact, predictions(plain, FILES[:1])[0]["receipt"], FILES[0]).status_code == 409


def test_auto_says_what_it_measured_and_serves_the_one_that_it_names(start, repository):
    server = start("--models", str(repository))
    served = get(f"{server.url}/models/exact").json()["form"]

    assert f"serving the {served} form" in server.said()
    assert predictions(server, FILES[:1])[0]["receipt"]["form"] == served


def test_a_form_that_a_model_does_not_have_ends_the_start_with_one_line(models):
    command = [sys.executable, "-m", "foldserve", "serve", "--port", "0", "--device", "cpu", "--form", "exact"]
    done = subprocess.run([*command, "--models", str(models)], capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("foldserve: ")]
    assert "tiny/1 has no exact form; export the model again, or serve it with --form float" in line
