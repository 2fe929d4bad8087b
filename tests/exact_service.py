"""Exact artifacts on disk, and kernels that go wrong on purpose: what the tests of serving exact models share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from exact_recipes import Recipe, make
from exact_support import Graph
from PIL import Image
from support import encode, spec_for

from service.artifact import EXACT_FILE, GOLDEN_FILE, MANIFEST_KEY, MODEL_FILE, Artifact
from service.engine import Device, open_engine
from service.executions import float_twin
from service.golden import Golden
from service.independence.exactness import reference_logits
from service.integers import read_steps
from service.manifest import Manifest

RECIPE = Recipe(seed=21, channels=3, side=8, blocks=("residual", "table", "strided"), images=8)


def manifest_of(graph: Graph, name: str) -> Manifest:
    side, classes = graph.images.shape[1], graph.values["logits"].shape[1]
    labels = tuple(f"c{index}" for index in range(classes))
    return Manifest(name=name, labels=labels, preprocessing=spec_for("RGB", (side, side)))


def golden_of(graph: Graph) -> Golden:
    """Return the graph's own images with the oracle's answers."""
    encoded = tuple(encode(Image.fromarray(one), "PNG") for one in graph.images)
    logits = graph.values["logits"]
    tolerance = 1e-4 * float(np.abs(logits).max())  # the float form is the same function, but for its last bits
    return Golden(encoded, graph.images, logits.astype(np.float64), tolerance, logits)


def stamped(model: onnx.ModelProto, manifest: Manifest) -> bytes:
    content = onnx.ModelProto()
    content.CopyFrom(model)
    content.metadata_props.add(key=MANIFEST_KEY, value=manifest.model_dump_json())
    return content.SerializeToString()


def write_exact(models: Path, graph: Graph | None = None, name: str = "exact") -> Path:
    """Write models/<name>/1/ with both forms, and return that folder. The float form is the twin's arithmetic."""
    graph = graph or make(RECIPE)
    folder, manifest = models / name / "1", manifest_of(graph, name)
    folder.mkdir(parents=True)
    (folder / MODEL_FILE).write_bytes(stamped(float_twin(graph.model()), manifest))
    (folder / EXACT_FILE).write_bytes(stamped(graph.model(), manifest))
    (folder / GOLDEN_FILE).write_bytes(golden_of(graph).to_bytes())
    return folder


def artifact_of(graph: Graph, folder: Path) -> Artifact:
    """Return the exact artifact of a graph, written to `folder` and read again."""
    return Artifact.load(write_exact(folder, graph), "exact")


def kind_of(model_bytes: bytes) -> str:
    """Return which execution an engine is opened for: integer, unsigned, twin, or a table alone."""
    graph = onnx.load_model_from_string(model_bytes).graph
    operators = {node.op_type for node in graph.node}
    if not operators & {"Conv", "QLinearConv"}:
        return "table"
    if "Conv" in operators:
        return "twin"
    return "integer" if any(one.data_type == onnx.TensorProto.INT8 for one in graph.initializer) else "unsigned"


Spoils = Callable[[str, np.ndarray, int], bool]  # execution, images, threads


class Kernels:
    """Opens real engines, whose answers lose a last bit wherever `spoils` says so; remembers what was opened."""

    def __init__(self, spoils: Spoils = lambda *_: False) -> None:
        self.spoils = spoils
        self.opened: list[str] = []

    def __call__(self, model_bytes: bytes, device: Device) -> "Kernel":
        self.opened.append(kind_of(model_bytes))
        return Kernel(self, model_bytes, device)


class Kernel:
    """One engine of `Kernels`."""

    def __init__(self, kernels: Kernels, model_bytes: bytes, device: Device) -> None:
        self._kernels, self._kind = kernels, kind_of(model_bytes)
        self._real = open_engine(model_bytes, device)

    def run(self, images: np.ndarray, threads: int = 1) -> np.ndarray:
        answers = self._real.run(images, threads)
        if not self._kernels.spoils(self._kind, images, threads):
            return answers
        return answers + 1 if self._kind == "table" else np.nextafter(answers, np.float32(np.inf))

    def describe(self) -> dict[str, object]:
        return self._real.describe()

    def settle(self) -> None:
        self._real.settle()

    def plain_convolutions(self) -> tuple[str, ...]:
        return self._real.plain_convolutions()


def wide_sums() -> Graph:
    """An 11×11 convolution of weights of one sign, whose sums are far from 0 before the bias brings them back."""
    random = np.random.default_rng(9)
    graph = Graph(random.integers(0, 256, (8, 20, 20, 3), dtype=np.uint8))
    weight = random.integers(64, 128, (16, 3, 11, 11))
    bias = -np.round(weight.sum((1, 2, 3)) * 127.5)
    x = graph.conv(graph.planes(), weight, bias, np.full(16, 0.37), y_zero=128)
    graph.head(x, random.integers(-9, 10, (1600, 5)), np.zeros(5), 0.01)
    return graph


class TransformingEngine:
    """Computes `wide_sums` itself: by integers, or where `transforms` says so by a Fourier transform in float32.

    A transform is no sum of products: its rounding errors exceed half a step, as Winograd's F(4×4) does.
    """

    def __init__(self, graph: Graph, transforms: Callable[[int, int], bool], machine: str = "one") -> None:
        self._steps = read_steps(graph.model())
        self._transforms = transforms
        self._machine = machine

    def run(self, images: np.ndarray, threads: int = 1) -> np.ndarray:
        if self._transforms(len(images), threads):
            return np.concatenate([self._transformed(image[np.newaxis]) for image in images])
        return reference_logits(self._steps, images)

    def _transformed(self, images: np.ndarray) -> np.ndarray:
        _, convolution, _, head = self._steps.steps
        planes, weight = images.transpose(0, 3, 1, 2).astype(np.float32), convolution.weight.astype(np.float32)
        size = (30, 30)  # 20 + 11 − 1: a linear convolution
        seen = np.fft.rfft2(planes, size)[:, np.newaxis] * np.fft.rfft2(weight[..., ::-1, ::-1], size)
        sums = np.fft.irfft2(seen.sum(2), size).astype(np.float32)[..., 10:20, 10:20]
        sums += convolution.bias.astype(np.float32)[:, None, None]
        scaled = np.rint(np.rint(sums) * convolution.factor[:, None, None])
        features = np.clip(scaled + convolution.y_zero, 0, 255).reshape(len(images), -1)
        return (features.astype(np.int64) @ head.weight.astype(np.int64)).astype(np.float32) * head.scale

    def describe(self) -> dict[str, object]:
        return {"runtime": {"onnxruntime": "none"}, "device": "cpu", "machine": self._machine, "execution": "integer"}

    def settle(self) -> None:
        pass

    def plain_convolutions(self) -> tuple[str, ...]:
        return ()
