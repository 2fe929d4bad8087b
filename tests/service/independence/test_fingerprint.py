"""Every change to what the bits hang on is seen, and nothing else is."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
from independence_support import gemm_head
from support import CPU, TinyModel

from service import preprocessing, processor
from service.engine import OnnxEngine
from service.independence import fingerprint as module
from service.independence.effort import FULL, QUICK
from service.independence.fingerprint import digest_of_json, fingerprint, flushes_subnormals

ROOT = Path(__file__).parents[3]
ENGINE = OnnxEngine(TinyModel().model_bytes(), CPU)


def facts(*, model="a", form="float", engine=ENGINE, candidates=((1, 1),)):
    return fingerprint(model, form, engine.describe(), [list(one) for one in candidates])


def test_the_same_machine_and_model_have_the_same_fingerprint():
    assert facts() == facts(engine=OnnxEngine(TinyModel().model_bytes(), CPU))


def test_it_is_json_that_reads_back_equal():
    assert json.loads(json.dumps(facts())) == facts()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "b"},
        {"form": "exact"},
        {"candidates": ((1, 1), (2, 1))},
        {"candidates": ((1, 2),)},
        {"engine": OnnxEngine(TinyModel().model_bytes(), CPU, {"session.disable_prepacking": "1"})},
        {"engine": OnnxEngine(TinyModel(seed=2).model_bytes(), CPU)},
        {"engine": OnnxEngine(gemm_head().SerializeToString(), CPU)},
    ],
    ids=["model", "form", "sizes", "threads", "session option", "weights", "graph"],
)
def test_another_model_or_setting_is_another_fingerprint(change):
    assert facts(**change) != facts()


@pytest.mark.parametrize("name", ["CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "CUDNN_X"])
def test_a_variable_that_arithmetic_hangs_on_is_part_of_it(monkeypatch, name):
    before = facts()
    monkeypatch.setenv(name, "17")

    assert facts() != before
    assert facts()["environment"][name] == "17"


def test_a_variable_that_means_nothing_is_no_part_of_it(monkeypatch):
    before = facts()
    monkeypatch.setenv("EDITOR", "ed")

    assert facts() == before


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (np, "__version__", "0.1"),
        (PIL, "__version__", "0.1"),
        (preprocessing.features, "version", lambda _: "0.1"),
        (module, "cpu_count", lambda: 1000),
        (module, "_quota", lambda: "1 1000"),
        (module, "flushes_subnormals", lambda: True),
        (module, "PROBE_VERSION", 99),
        (module, "FULL", replace(FULL, repeats=51)),
        (module, "QUICK", replace(QUICK, images=9)),
        (processor.platform, "machine", lambda: "pdp11"),
    ],
    ids=[
        "numpy",
        "Pillow",
        "a codec",
        "cores",
        "quota",
        "subnormals",
        "probe",
        "full effort",
        "quick effort",
        "machine",
    ],
)
def test_another_library_or_machine_is_another_fingerprint(monkeypatch, place, name, value):
    before = facts()
    monkeypatch.setattr(place, name, value)

    assert facts() != before


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_it_names_the_processor_and_its_instruction_sets():
    told = facts()["processor"]

    assert told["machine"]
    assert told["flags"] == sorted(set(told["flags"]))
    assert told["flags"]
    assert not {"vme", "msr", "hypervisor", "apic"} & set(told["flags"]), "kernels are not chosen by these"


def test_it_holds_the_runtime_and_the_libraries_that_are_loaded():
    engine = facts()["engine"]

    assert engine["runtime"]["onnxruntime"]
    assert engine["build"]
    assert len(engine["optimized_graph"]) == 64
    assert engine["session"]["session.set_denormal_as_zero"] == "0"
    assert any("onnxruntime" in name for name in engine["libraries"])


def libraries_after_loading(folder: Path, name: str, tail: bytes = b"") -> dict[str, str]:
    """Load a copy of the mathematics library, in a new process; bytes after its end change nothing that it does."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    original = next(line.split(maxsplit=5)[5] for line in maps if "/libm." in line or "/libm-" in line)
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(shutil.copy(original, folder / name))
    path.write_bytes(path.read_bytes() + tail)
    script = (
        "import ctypes, json, sys; from service.engine import loaded_libraries;"
        "ctypes.CDLL(sys.argv[1]); print(json.dumps(loaded_libraries()))"
    )
    command = [sys.executable, "-c", script, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)


@pytest.mark.parametrize("folder", ["plain", "with a space"])
def test_an_arithmetic_library_is_seen_wherever_it_lies(tmp_path, folder):
    assert "libcublas.so.1" in libraries_after_loading(tmp_path / folder, "libcublas.so.1")


def test_another_file_of_the_same_name_is_another_library(tmp_path):
    cases = (("one", b""), ("two", b"x"), ("three", b"y"))
    seen = {libraries_after_loading(tmp_path / one, "libcudnn.so.9", tail)["libcudnn.so.9"] for one, tail in cases}

    assert len(seen) == 3


def test_numbers_too_small_are_kept_here():
    assert not flushes_subnormals()


def test_a_thread_that_flushes_them_is_seen():
    script = """
import onnxruntime as ort
from support import TinyModel
from service.independence.fingerprint import flushes_subnormals
options = ort.SessionOptions()
options.add_session_config_entry("session.set_denormal_as_zero", "1")
session = ort.InferenceSession(TinyModel().model_bytes(), options, providers=["CPUExecutionProvider"])
print(flushes_subnormals())
"""
    places = [str(ROOT / "tests"), str(ROOT)]
    command = [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path[:0] = {places}\n{script}"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)

    assert answer.stdout.strip() == "True"


def test_canonical_json_knows_no_order_and_no_spaces():
    assert digest_of_json({"a": [1, 2], "b": "é"}) == digest_of_json({"b": "é", "a": [1, 2]})
    assert digest_of_json([1, 2]) != digest_of_json([2, 1])
    assert digest_of_json({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
