"""What the tests of `service.independence` share: graphs that break, artifacts without a folder, faults on purpose."""

import hashlib
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from support import CPU, TinyModel, spec_for

from service.artifact import Artifact
from service.engine import OnnxEngine, Shape
from service.golden import Golden
from service.independence.certify import Subject
from service.independence.effort import Effort
from service.independence.fingerprint import fingerprint
from service.manifest import Manifest

SHAPES = (Shape(1, 1), Shape(2, 1), Shape(4, 1), Shape(1, 4))
FOLDER = tempfile.TemporaryDirectory(prefix="artifacts-")
BRIEF = Effort(budget_s=20.0, images=16, slots=16, fills=5, targets=2, repeats=8, concurrent_runs=24)


def artifact_of(model: onnx.ModelProto, name: str = "tiny") -> Artifact:
    """Return the artifact of a graph, as if it had been loaded."""
    _, height, width, channels = (one.dim_value for one in model.graph.input[0].type.tensor_type.shape.dim)
    classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    pixels = np.random.default_rng(7).integers(0, 256, (8, height, width, channels), np.uint8)
    spec = spec_for("RGB", (height, width))
    manifest = Manifest(name=name, labels=tuple(f"c{index}" for index in range(classes)), preprocessing=spec)
    golden = Golden((b"",) * 8, pixels, np.zeros((8, classes)), 1.0)
    content = model.SerializeToString()
    digest = hashlib.sha256(content).hexdigest()
    path = Path(FOLDER.name, digest)
    path.write_bytes(content)
    return Artifact(path, digest, manifest, golden)


def subject(model: onnx.ModelProto, shapes: Sequence[Shape] = SHAPES, engine=None, **config: str) -> Subject:
    """Return what `certify` takes, with a real engine unless another is given."""
    artifact = artifact_of(model)
    engine = engine or OnnxEngine(artifact.model_bytes, CPU, {key.replace("__", "."): config[key] for key in config})
    return Subject("tiny", 1, artifact, engine, tuple(shapes))


def tiny_subject(shapes: Sequence[Shape] = SHAPES, engine=None) -> Subject:
    return subject(TinyModel().onnx(), shapes, engine)


def facts_of(one: Subject) -> dict[str, object]:
    """Return a subject's fingerprint."""
    listed = [[shape.batch_size, shape.threads] for shape in one.candidates]
    return fingerprint(one.artifact.digest, one.artifact.form, one.engine.describe(), listed)


def graph(nodes, side: int, channels: int, classes: int, **constants: np.ndarray) -> onnx.ModelProto:
    """Return a model whose `planes` (batch, channels, side, side), float32 in 0 to 1, are there for its nodes."""
    front = [
        helper.make_node("Transpose", ["image"], ["bytes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["bytes"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["floats", "scale"], ["planes"]),
    ]
    constants["scale"] = np.float32(255).reshape(())
    proto = helper.make_graph(
        [*front, *nodes],
        "case",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", side, side, channels])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def gemm_head() -> onnx.ModelProto:
    """192 features → 100 logits: without prepacked weights a lone image takes another kernel."""
    nodes = [
        helper.make_node("Flatten", ["planes"], ["features"]),
        helper.make_node("Gemm", ["features", "matrix"], ["logits"], transB=1),
    ]
    return graph(nodes, 8, 3, 100, matrix=normal(100, 192))


def wide_convolution(channels: int) -> onnx.ModelProto:
    """A 3×3 convolution; with 258 channels, no multiple of 4, the blocked layout refuses it."""
    nodes = [
        helper.make_node("Conv", ["planes", "widen"], ["wide"], name="widen"),
        helper.make_node("Conv", ["wide", "filters"], ["features"], name="plain"),
        helper.make_node("Flatten", ["features"], ["flat"]),
        helper.make_node("Gemm", ["flat", "matrix"], ["logits"], transB=1),
    ]
    weights = {"widen": normal(channels, 3, 1, 1), "filters": normal(66, channels, 3, 3) / 48}
    return graph(nodes, 12, 3, 10, matrix=normal(10, 6600) / 81, **weights)


def mean_head() -> onnx.ModelProto:
    """Means of three 7×7 planes by ReduceMean: the order of its sums hangs on where in memory a plane begins."""
    nodes = [
        helper.make_node("ReduceMean", ["planes", "axes"], ["features"], keepdims=0),
        helper.make_node("Gemm", ["features", "matrix"], ["logits"], transB=1),
    ]
    return graph(nodes, 7, 3, 5, matrix=normal(5, 3), axes=np.array([2, 3]))


def dynamically_quantized() -> onnx.ModelProto:
    """One image sets the scale of its neighbours."""
    nodes = [
        helper.make_node("Flatten", ["planes"], ["features"]),
        helper.make_node("DynamicQuantizeLinear", ["features"], ["q", "s", "z"], name="quantize"),
        helper.make_node("MatMulInteger", ["q", "matrix", "z"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["whole"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["whole", "s"], ["logits"]),
    ]
    matrix = np.random.default_rng(1).integers(0, 127, (192, 5), np.uint8)
    return graph(nodes, 8, 3, 5, matrix=matrix)


def training_norm() -> onnx.ModelProto:
    """BatchNormalization with the batch's own statistics."""
    inputs = ["planes", "ones", "zeros", "zeros", "ones"]
    nodes = [
        helper.make_node("BatchNormalization", inputs, ["normed", "m", "v"], name="norm", training_mode=1),
        helper.make_node("GlobalAveragePool", ["normed"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "matrix"], ["logits"], transB=1),
    ]
    return graph(nodes, 8, 3, 5, matrix=normal(5, 3), ones=np.ones(3, np.float32), zeros=np.zeros(3, np.float32))


def answers(images: np.ndarray, classes: int = 3) -> np.ndarray:
    """Return logits that hang on each image alone, bit for bit, made without any kernel."""
    totals = images.reshape(len(images), -1).astype(np.int64) @ (1 + np.arange(images[0].size) % 97)
    return ((totals[:, None] + 7919 * np.arange(classes)) % 65521).astype(np.float32) / 3


def flip(logits: np.ndarray, row: int, *columns: int) -> np.ndarray:
    """Return the logits with the last bit of some numbers of one image turned over."""
    bits = logits.copy().view(np.uint32)
    bits[row, list(columns or (0,))] ^= 1
    return bits.view(np.float32)


class FaultyEngine:
    """An engine of pure integers with one fault: `fault(images, threads, logits)` returns what it says instead."""

    def __init__(self, fault: Callable | None = None) -> None:
        self.fault = fault
        self.shapes: list[tuple[int, int]] = []

    def run(self, images: np.ndarray, threads: int = 1) -> np.ndarray:
        self.shapes.append((len(images), threads))
        logits = answers(images)
        return logits if self.fault is None else self.fault(images, threads, logits)

    def describe(self) -> dict[str, object]:
        return {"runtime": {"onnxruntime": "none"}, "device": "cpu"}

    def settle(self) -> None:
        pass

    def plain_convolutions(self) -> tuple[str, ...]:
        return ()


class Crowded:
    """A fault that shows only while two runs are under way, or only in threads that are not this one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.under_way = 0
        self.met = threading.Event()

    def __call__(self, images: np.ndarray, threads: int, logits: np.ndarray) -> np.ndarray:
        with self.lock:
            self.under_way += 1
            if self.under_way > 1:
                self.met.set()
        if threading.current_thread() is not threading.main_thread():
            self.met.wait(0.05)
        with self.lock:
            self.under_way -= 1
        return flip(logits, 0) if self.met.is_set() else logits
