"""Ways to run one exact model: sessions of ONNX Runtime, PyTorch in several arithmetics and layouts, OpenVINO.

Each way is a function from pixels to logits. PyTorch takes the model's steps, read from the file, and computes them
with its own convolutions; that is written here, so it shares nothing with the runtimes it is compared with.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from service.executions import EXECUTIONS, execute_as
from service.integers import Convolution, Head, Move, Pair, Steps, Table
from service.integers.steps import BYTE
from training.exact.moving import CONVOLUTIONS, move, padded

LEVELS = {
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
THREADS = (1, 2, 3, 4)

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]
Run = Callable[[Pixels], Logits]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the model. `breaks` is why its kernels are not sums of products in 24 bits, where they are not."""

    runtime: str
    how: str
    run: Run
    breaks: str = ""


def session(model_bytes: bytes, *, level: str = "all", threads: int = 1, providers: Any = None) -> Run:
    """Return a run of an ONNX Runtime session, on the CPU where no providers are named."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone
    opened = onnxruntime.InferenceSession(model_bytes, options, providers=providers or ["CPUExecutionProvider"])
    if providers and opened.get_providers()[0] != providers[0][0]:
        sys.exit(f"ONNX Runtime fell back from {providers[0][0]}")
    name = opened.get_inputs()[0].name
    return lambda images: opened.run(None, {name: images})[0]


def onnxruntime_ways(model: onnx.ModelProto) -> Iterator[Way]:
    """Yield every execution at every optimization level and number of threads."""
    for execution in EXECUTIONS:
        content = execute_as(model, execution).SerializeToString()
        for level in LEVELS:
            for threads in THREADS:
                run = session(content, level=level, threads=threads)
                yield Way("ONNX Runtime", f"{execution}, {level}, {threads} threads", run)


def torch_ways(steps: Steps) -> Iterator[Way]:
    """Yield PyTorch's float32 in both layouts, float64, and the two that are no sums of products in 24 bits."""
    runtime = "PyTorch"
    for threads in (1, 2):
        many = f"{threads} threads"
        yield Way(runtime, f"float32, {many}", TorchRun(steps, torch.float32, threads=threads))
        last = TorchRun(steps, torch.float32, threads=threads, layout=torch.channels_last)
        yield Way(runtime, f"float32, channels last, {many}", last)
        yield Way(runtime, f"float64, {many}", TorchRun(steps, torch.float64, threads=threads))
    plain = TorchRun(steps, torch.float32, mkldnn=False)
    transforms = "NNPACK computes 3×3 convolutions of 16 images and more by a transform, which rounds in between"
    yield Way(runtime, "float32 without oneDNN", plain, transforms)
    yield Way(runtime, "float32 without oneDNN and NNPACK", TorchRun(steps, torch.float32, mkldnn=False, nnpack=False))
    rounded = TorchRun(steps, torch.bfloat16)
    yield Way(runtime, "bfloat16", rounded, "sums are rounded to 8 bits when they are stored")


def openvino_ways(twin: onnx.ModelProto, steps: Steps) -> Iterator[Way]:
    """Yield OpenVINO in float32 and in bfloat16; nothing where it is not installed."""
    try:
        import openvino
    except ImportError:
        return
    core = openvino.Core()
    for precision, breaks in (("f32", ""), ("bf16", "results between layers are rounded to 8 bits")):
        for threads in (1, 2):
            options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
            compiled = core.compile_model(core.read_model(twin.SerializeToString()), "CPU", options)
            run = _openvino_run(compiled, steps.image)
            yield Way("OpenVINO", f"{precision}, {threads} threads", run, breaks)


def _openvino_run(compiled: Any, image: str) -> Run:
    return lambda images: compiled({image: images})[0]


class TorchRun:
    """The steps of an exact model in PyTorch: integers held in `dtype`, one product in float32 behind each sum."""

    def __init__(
        self,
        steps: Steps,
        dtype: torch.dtype,
        *,
        threads: int = 1,
        layout: torch.memory_format = torch.contiguous_format,
        mkldnn: bool = True,
        nnpack: bool = True,
    ) -> None:
        self._steps, self._dtype, self._threads = steps, dtype, threads
        self._layout = layout
        self._backends = {torch.backends.mkldnn: mkldnn, torch.backends.nnpack: nnpack}
        self._weights = {
            id(one): tuple(self._held(part.astype(np.float32)) for part in (one.weight, one.bias))
            for one in steps.products()
        }

    @torch.no_grad()
    def __call__(self, images: Pixels) -> Logits:
        """Return logits (N, K) for images uint8 (N, height, width, channels)."""
        torch.set_num_threads(self._threads)
        tensors = {self._steps.image: torch.from_numpy(images).to(self._dtype)}
        with ExitStack() as flags:
            for backend in (one for one, wanted in self._backends.items() if not wanted):
                flags.enter_context(backend.flags(enabled=False))
            for step in self._steps.steps:
                tensors |= self._take(step, tensors)
        logits: Logits = tensors[self._steps.logits].numpy()
        return logits

    def _held(self, values: NDArray[Any]) -> Tensor:
        return torch.tensor(values).to(self._dtype)

    def _take(self, step: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(step, Move):
            return dict(zip(step.outputs, _moved(step, [tensors[name] for name in step.inputs]), strict=True))
        if isinstance(step, Pair):
            return {step.y.tensor: self._pair(step, tensors[step.a.tensor], tensors[step.b.tensor])}
        if isinstance(step, Table):
            return {step.y: self._held(step.entries)[tensors[step.x].long()]}
        made = self._convolution(step, tensors[step.x]) if isinstance(step, Convolution) else self._head(step, tensors)
        return {step.y: made}

    def _convolution(self, step: Convolution, x: Tensor) -> Tensor:
        weight, bias = self._weights[id(step)]
        centred = padded(x - step.x_zero, step.pads)
        if x.ndim == 4:
            centred, weight = centred.contiguous(memory_format=self._layout), weight.to(memory_format=self._layout)
        sums = CONVOLUTIONS[x.ndim](centred, weight, bias, step.strides, 0, step.dilations, step.groups)
        factor = torch.tensor(step.factor).reshape(-1, *[1] * (x.ndim - 2))
        return self._bytes(sums.float() * factor, step.y_zero)

    def _pair(self, step: Pair, a: Tensor, b: Tensor) -> Tensor:
        left = (a.float() - step.a.zero) * step.a.scale
        right = (b.float() - step.b.zero) * step.b.scale
        return self._bytes((left + right if step.operation == "Add" else left * right) / step.y.scale, step.y.zero)

    def _head(self, step: Head, tensors: dict[str, Tensor]) -> Tensor:
        weight, bias = self._weights[id(step)]
        sums = functional.linear(tensors[step.x] - step.x_zero, weight.T, bias)
        return sums.float() * torch.tensor(step.scale)

    def _bytes(self, value: Tensor, zero: int) -> Tensor:
        return (torch.round(value) + zero).clamp(0, BYTE).to(self._dtype)


def _moved(step: Move, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    if step.node.op_type == "Clip":
        low, high = (float(step.constants[at].reshape(())) for at in (1, 2))
        return (inputs[0].clamp(low, high),)
    return move(step, inputs)  # type: ignore[arg-type]  # it reads what both kinds of Move have
