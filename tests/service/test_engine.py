"""Real sessions: right numbers, the same bits in every batch, and a device that is never chosen in silence."""

import ctypes
import errno
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support import CPU, TinyModel, random_pixels

from service.engine import Device, choose_device, cuda_problem, describe_runtime, open_engine
from service.errors import ArtifactError, DeviceError

DEMO = Path(__file__).parents[2] / "models" / "mnist" / "1" / "model.onnx"


def has_nvidia_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


without_cuda = pytest.mark.skipif(has_nvidia_driver(), reason="there is an NVIDIA driver here")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_logits_are_those_of_the_float64_twin(mode):
    tiny, pixels = TinyModel(mode=mode), random_pixels(16, mode, seed=3)

    logits = open_engine(tiny.model_bytes(), CPU).run(pixels)

    assert logits.dtype == np.float32
    assert np.abs(logits - tiny.logits(pixels)).max() <= tiny.tolerance(pixels)


def assert_same_bits_in_every_batch(run, pixels: np.ndarray) -> None:
    alone = np.concatenate([run(pixels[[index]]) for index in range(len(pixels))]).view(np.uint32)
    for size in range(2, 9):
        for start in range(0, len(pixels) - size + 1, size):
            together = run(pixels[start : start + size]).view(np.uint32)
            assert np.array_equal(together, alone[start : start + size]), f"batch of {size}"


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_image_gets_the_same_bits_alone_and_in_a_batch(mode):
    engine = open_engine(TinyModel(mode=mode).model_bytes(), CPU)

    assert_same_bits_in_every_batch(engine.run, random_pixels(16, mode))


@pytest.mark.parametrize("threads", [1, 3])
def test_options_that_can_change_a_bit_are_pinned(threads):
    engine = open_engine(TinyModel().model_bytes(), CPU)
    engine.run(random_pixels(1), threads)
    options = engine._sessions[threads].get_session_options()

    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)
    assert options.use_deterministic_compute
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "0"
    assert options.get_session_config_entry("session.disable_prepacking") == "0"


@pytest.mark.skipif(not DEMO.exists(), reason="the demo model is not there yet")
def test_the_demo_model_gives_the_same_bits_alone_and_in_a_batch():
    model_bytes = DEMO.read_bytes()
    _, height, width, channels = (dim.dim_value for dim in onnx.load(DEMO).graph.input[0].type.tensor_type.shape.dim)
    pixels = np.random.default_rng(0).integers(0, 256, (16, height, width, channels), dtype=np.uint8)

    assert_same_bits_in_every_batch(open_engine(model_bytes, CPU).run, pixels)


def test_several_threads_get_the_bits_that_one_gets():
    engine, pixels = open_engine(TinyModel().model_bytes(), CPU), random_pixels(64)
    expected = [engine.run(pixels[[index]]) for index in range(64)]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda index: engine.run(pixels[[index]]), range(64)))

    assert all(np.array_equal(one, other) for one, other in zip(answers, expected, strict=True))


@pytest.mark.parametrize("damage", ["no model", "unknown operator"])
def test_a_model_that_the_runtime_cannot_run_is_an_artifact_error(damage):
    model = TinyModel().onnx()
    model.graph.node[0].op_type = "NoSuchOperator"
    content = b"hello" if damage == "no model" else model.SerializeToString()

    with pytest.raises(ArtifactError, match="cannot run the model"):
        open_engine(content, CPU)


def test_weights_in_another_file_are_refused():
    model = TinyModel().onnx()
    weight = next(one for one in model.graph.initializer if one.name == "filters")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")

    with pytest.raises(ArtifactError):
        open_engine(model.SerializeToString(), CPU)


def test_cpu_can_be_asked_for_and_needs_no_reason():
    assert choose_device("cpu") == Device("cpu", "cpu", "")


@without_cuda
def test_cuda_that_cannot_be_had_is_refused_with_what_is_missing_and_the_mend():
    with pytest.raises(DeviceError, match=r"cuda cannot be had: there is no NVIDIA driver .*; install it"):
        choose_device("cuda")


@without_cuda
def test_auto_falls_back_and_says_why(caplog):
    with caplog.at_level("INFO"):
        device = choose_device("auto")

    assert (device.requested, device.used) == ("auto", "cpu")
    assert "no NVIDIA driver" in device.reason
    assert device.reason in caplog.text


@without_cuda
def test_a_session_that_silently_left_cuda_is_refused():
    if cuda_problem() is None:  # pragma: no cover - the mark above says so already
        pytest.skip("CUDA works here")
    with pytest.raises((DeviceError, ArtifactError)):
        open_engine(TinyModel().model_bytes(), Device("cuda", "cuda"))


def test_the_runtime_describes_itself():
    described = describe_runtime()

    assert described["onnxruntime"]
    assert "CPUExecutionProvider" in described["providers"]


def test_an_engine_that_has_settled_runs_as_before_without_its_file():
    engine, pixels = open_engine(TinyModel().model_bytes(), CPU), random_pixels(4)
    before = [engine.run(pixels, threads) for threads in (1, 2)]
    facts = engine.describe()

    engine.settle()

    assert engine._model_bytes is None
    assert all(session._model_bytes is None for session in engine._sessions.values()), "kept"
    for threads, logits in zip((1, 2), before, strict=True):
        assert np.array_equal(engine.run(pixels, threads).view(np.uint32), logits.view(np.uint32))
    assert engine.describe() == facts


def test_an_engine_that_has_settled_says_that_it_knows_no_other_number_of_threads():
    engine = open_engine(TinyModel().model_bytes(), CPU)
    engine.settle()

    with pytest.raises(ArtifactError, match="settled on other numbers of threads"):
        engine.run(random_pixels(1), 3)


def test_a_full_temporary_folder_is_an_error_that_names_it(monkeypatch, tmp_path):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    engine = open_engine(TinyModel().model_bytes(), CPU)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    with pytest.raises(ArtifactError, match=rf"{tmp_path} cannot take the model .*No space left on device.*TMPDIR"):
        engine.run(random_pixels(1), 3)
