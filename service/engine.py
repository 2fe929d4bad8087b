"""ONNX Runtime, and nothing else: sessions, devices, threads. The only user of onnxruntime.

Every option that can change a bit of the answer is set here, with its reason, and none is left to a default.
"""

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.errors import ArtifactError, DeviceError

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
CUDA_OPTIONS = {
    "device_id": "0",
    "cudnn_conv_algo_search": "HEURISTIC",  # a function of shape and versions; EXHAUSTIVE may race by the clock
    "use_tf32": "0",  # on by default; it rounds inputs of products to 11 bits
    "arena_extend_strategy": "kSameAsRequested",  # the default doubles memory at each growth
}

Requested = Literal["auto", "cuda", "cpu"]
Used = Literal["cuda", "cpu"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device:
    """Where models run: what was asked for, what is used, and the reason where the two differ."""

    requested: Requested
    used: Used
    reason: str = ""


class Engine(Protocol):
    """Runs a model: the seam where tests put their fake."""

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits (N, classes) for images (N, height, width, channels). Safe to call from several threads."""
        ...


OpenEngine = Callable[[bytes, Device], Engine]


class OnnxEngine:
    """One ONNX Runtime session."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits (N, classes), float32, for images (N, height, width, channels), uint8."""
        logits: NDArray[np.float32] = self._session.run(None, {self._input: images})[0]
        return logits


def open_engine(model_bytes: bytes, device: Device) -> OnnxEngine:
    """Make a session for an ONNX file on `device`.

    Raises ArtifactError where the file cannot be run, DeviceError where CUDA was taken away in silence.
    """
    providers: list[Any] = [(CUDA, CUDA_OPTIONS), CPU] if device.used == "cuda" else [CPU]
    try:
        session = ort.InferenceSession(model_bytes, _session_options(), providers=providers)
    except Exception as error:  # onnxruntime raises a dozen types of its own
        raise ArtifactError(f"ONNX Runtime {ort.__version__} cannot run the model: {error}") from error
    if device.used == "cuda" and session.get_providers()[0] != CUDA:
        raise DeviceError("ONNX Runtime fell back from CUDA to the CPU; " + (cuda_problem() or "see its log"))
    return OnnxEngine(session)


def choose_device(requested: Requested) -> Device:
    """Return the device to use. `auto` falls back to the CPU and says why; `cuda` raises DeviceError instead."""
    problem = None if requested == "cpu" else cuda_problem()
    if requested == "cuda" and problem:
        raise DeviceError(f"device cuda cannot be had: {problem}")
    if requested == "auto" and problem:
        logger.info("device auto: running on the CPU, because %s", problem)
        return Device(requested, "cpu", problem)
    return Device(requested, "cpu" if requested == "cpu" else "cuda")


def cuda_problem() -> str | None:
    """Return why CUDA cannot be had here, with the missing library and the mend, or None where it can."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"there is no NVIDIA driver ({error}); install it, or in a container start with --gpus all"
    if CUDA not in ort.get_available_providers():
        return (
            f"the installed onnxruntime {ort.__version__} has no CUDA; "
            "in a fresh environment: pip install 'foldserve[gpu]'"
        )
    try:
        ort.preload_dlls()  # the CUDA and cuDNN wheels lie outside the loader's search path
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return f"a library is missing: {error}; in a fresh environment: pip install 'foldserve[gpu]'"
    devices = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(devices)) != 0 or devices.value == 0:
        return "the NVIDIA driver shows no device; in a container, start it with --gpus all"
    return None


def describe_runtime() -> dict[str, object]:
    """Return the runtime's version and the providers that it was built with."""
    return {"onnxruntime": ort.__version__, "providers": ort.get_available_providers()}


def _session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    # Blocked layouts sum each output in one order whatever the batch; the plain ones of lower levels do not.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # One thread a run: how work is cut between threads can change the order of sums. Lanes use the other cores.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True  # CUDA reductions without atomics; no effect on the CPU
    # Set per thread, and not for later callers: with "1", half a batch would be flushed and half not.
    options.add_session_config_entry("session.set_denormal_as_zero", "0")
    options.add_session_config_entry("session.disable_prepacking", "0")  # "1" sums a lone image in another order
    options.log_severity_level = 3  # errors; warnings about node placement are noise
    return options
