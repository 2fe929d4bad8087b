"""ONNX Runtime, and nothing else: sessions, devices, threads. The only user of onnxruntime.

Every option that can change a bit of the answer is set here, with its reason, and none is left to a default.
"""

import contextlib
import ctypes
import hashlib
import logging
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from service.config import pin_cuda_arithmetic
from service.errors import ArtifactError, DeviceError

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
CUDA_OPTIONS = {
    "device_id": "0",
    "cudnn_conv_algo_search": "HEURISTIC",  # a function of shape and versions; EXHAUSTIVE may race by the clock
    "use_tf32": "0",  # on by default; it rounds inputs of products to 11 bits
    "arena_extend_strategy": "kSameAsRequested",  # the default doubles memory at each growth
}

SESSION_CONFIG = {
    # Set per thread, and not for later callers: with "1", half a batch would be flushed and half not.
    "session.set_denormal_as_zero": "0",
    "session.disable_prepacking": "0",  # "1" sums a lone image in another order
    "session.intra_op.allow_spinning": "0",  # idle threads sleep: lanes share the cores
}
SESSION_FACTS = {"optimization": "all", "execution": "sequential", "inter_op_threads": 1, "deterministic_compute": True}
PLAIN_CONVOLUTIONS = frozenset({"Conv", "FusedConv"})
ARITHMETIC_LIBRARY = re.compile(
    r"(onnxruntime|libcu(da|blas|dnn|fft|rand|sparse|solver)|libnvrtc|libnvidia-ptx|libgomp|libomp)[^/]*\.so"
)

Requested = Literal["auto", "cuda", "cpu"]
Used = Literal["cuda", "cpu"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device:
    """Where models run: what was asked for, what is used, and the reason where the two differ."""

    requested: Requested
    used: Used
    reason: str = ""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """A way to run: how many images together, on how many threads."""

    batch_size: int
    threads: int


class Engine(Protocol):
    """Runs a model: the seam where tests put their fake."""

    def run(self, images: NDArray[np.uint8], threads: int = 1) -> NDArray[np.float32]:
        """Return logits (N, classes) for images (N, height, width, channels). Safe to call from several threads."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what its bits hang on: runtime, options, libraries, optimized graph. Part of the fingerprint."""
        ...

    def plain_convolutions(self) -> tuple[str, ...]:
        """Return the convolutions that the runtime left in a layout whose sums depend on how threads cut them."""
        ...

    def settle(self) -> None:
        """Keep what runs on the numbers of threads that were seen need, and nothing else: there will be no others."""
        ...


OpenEngine = Callable[[bytes, Device], Engine]


class OnnxEngine:
    """ONNX Runtime sessions of one model: on the CPU one for each number of threads, on CUDA one for each shape.

    CUDA plans its convolutions anew for each shape that a session meets, and keeps only the last plan.
    """

    def __init__(self, model_bytes: bytes, device: Device, config: Mapping[str, str] | None = None) -> None:
        self._model_bytes: bytes | None = model_bytes  # until it has settled
        self._device = device
        self._config = SESSION_CONFIG | dict(config or {})
        self._sessions: dict[object, ort.InferenceSession] = {}
        self._making = threading.Lock()  # sessions are made one after another
        optimized = self._optimized_graph()  # as large as the model: what is asked of it is kept, not the graph
        self._optimized_sha256 = hashlib.sha256(optimized).hexdigest()
        self._plain_convolutions = _plain_convolutions(optimized) if device.used == "cpu" else ()

    def run(self, images: NDArray[np.uint8], threads: int = 1) -> NDArray[np.float32]:
        """Return logits (N, classes), float32, for images (N, height, width, channels), uint8."""
        key: object = threads if self._device.used == "cpu" else (len(images), threads)
        session = self._sessions.get(key) or self._make(key, threads)
        logits: NDArray[np.float32] = session.run(None, {self._input: images})[0]
        return logits

    def describe(self) -> dict[str, Any]:
        """Return what the bits of an answer hang on, as far as the runtime goes."""
        return {
            "runtime": describe_runtime(),
            "build": ort.get_build_info(),
            "device": self._device.used,
            "provider_options": CUDA_OPTIONS if self._device.used == "cuda" else {},
            "session": {**dict(sorted(self._config.items())), **SESSION_FACTS},
            "gpu": describe_gpu() if self._device.used == "cuda" else {},
            "libraries": loaded_libraries(),
            "optimized_graph": self._optimized_sha256,
        }

    def plain_convolutions(self) -> tuple[str, ...]:
        """Return the names of Conv nodes that ONNX Runtime's blocked layout refused; none on CUDA, which is probed."""
        return self._plain_convolutions

    def settle(self) -> None:
        """Forget the file, from which no session is made any more; but on CUDA, where more shapes may come."""
        if self._device.used == "cpu":
            self._model_bytes = None

    def _make(self, key: object, threads: int) -> ort.InferenceSession:
        with self._making:
            if key not in self._sessions:
                self._sessions[key] = self._open(_session_options(self._config, threads))
            return self._sessions[key]

    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        """Make a session from a file: bytes it would hold as long as it lives."""
        providers: list[Any] = [(CUDA, CUDA_OPTIONS), CPU] if self._device.used == "cuda" else [CPU]
        if self._model_bytes is None:
            raise ArtifactError("the engine has settled on other numbers of threads than this one")
        with _temporary_files(), tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            file.write(self._model_bytes)
            file.flush()
            return self._open_file(file.name, options, providers)

    def _open_file(self, path: str, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
        try:
            session = ort.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime raises a dozen types of its own
            raise ArtifactError(f"ONNX Runtime {ort.__version__} cannot run the model: {error}") from error
        if self._device.used == "cuda" and session.get_providers()[0] != CUDA:
            raise DeviceError("ONNX Runtime fell back from CUDA to the CPU; " + (cuda_problem() or "see its log"))
        return session

    def _optimized_graph(self) -> bytes:
        """Return the graph as the runtime rewrote it, which is what really runs."""
        with _temporary_files(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            options = _session_options(self._config, 1)
            options.optimized_model_filepath = str(path)
            session = self._open(options)
            self._input = session.get_inputs()[0].name
            if self._device.used == "cpu":
                self._sessions[1] = session
            return path.read_bytes()


@contextlib.contextmanager
def _temporary_files() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        folder = tempfile.tempdir or "the temporary folder"
        raise ArtifactError(
            f"{folder} cannot take the model while it is opened ({error.strerror}); make room, or set TMPDIR"
        ) from None


def _plain_convolutions(optimized: bytes) -> tuple[str, ...]:
    nodes = onnx.load_model_from_string(optimized).graph.node
    plain = (node for node in nodes if node.op_type in PLAIN_CONVOLUTIONS and "nchwc" not in node.domain)
    return tuple(node.name or node.output[0] for node in plain)


def open_engine(model_bytes: bytes, device: Device) -> OnnxEngine:
    """Make an engine for an ONNX file on `device`.

    Raises ArtifactError where the file cannot be run, DeviceError where CUDA was taken away in silence.
    """
    return OnnxEngine(model_bytes, device)


def choose_device(requested: Requested) -> Device:
    """Return the device to use. `auto` falls back to the CPU and says why; `cuda` raises DeviceError instead."""
    problem = None if requested == "cpu" else cuda_problem()
    if requested == "cuda" and problem:
        raise DeviceError(f"device cuda cannot be had: {problem}")
    if requested == "auto" and problem:
        logger.info("device auto: running on the CPU, because %s", problem)
        return Device(requested, "cpu", problem)
    if requested == "cpu":
        return Device(requested, "cpu")
    pin_cuda_arithmetic()
    return Device(requested, "cuda")


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


def describe_gpu() -> dict[str, str]:
    """Return the first GPU's name, compute capability, MIG mode and driver, as nvidia-smi tells them, or nothing."""
    query = [
        "nvidia-smi",
        "--query-gpu=name,compute_cap,mig.mode.current,driver_version",
        "--format=csv,noheader",
        "--id=0",
    ]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(("name", "compute_capability", "mig", "driver"), answer.strip().split(", "), strict=False))


def describe_runtime() -> dict[str, object]:
    """Return the runtime's version and the providers that it was built with."""
    return {"onnxruntime": ort.__version__, "providers": ort.get_available_providers()}


def loaded_libraries() -> dict[str, str]:
    """Return the arithmetic libraries that this process has loaded, each with its size and the sha256 of its ends.

    A wheel's version is not enough: the loader may have taken another file. Whole files of cuDNN would take seconds.
    """
    try:
        maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return {}
    paths = {fields[5] for fields in maps if len(fields) == 6}  # proc(5): the name comes last and may hold spaces
    arithmetic = sorted(path for path in paths if ARITHMETIC_LIBRARY.search(path) and Path(path).is_file())
    return {Path(path).name: _identity(Path(path)) for path in arithmetic}


def _identity(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(2**20)
        file.seek(max(0, size - 2**20))
        ends += file.read()
    return f"{size}:{hashlib.sha256(ends).hexdigest()}"


def _session_options(config: Mapping[str, str], threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    # Blocked layouts sum each output in one order whatever the batch; the plain ones of lower levels do not.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Set, never left to the machine: how work is cut between threads can change the order of sums.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True  # CUDA reductions without atomics; no effect on the CPU
    options.log_severity_level = 3  # errors; warnings about node placement are noise
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return options
