"""Files of each opset from 9 to 23, with what its operators looked like then, are imported, folded and answer alike."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_support import CLASSES, FILTERS, SIDE, Graph
from onnx import NodeProto, helper, numpy_helper

from service.artifact import Artifact
from service.engine import choose_device, open_engine
from training.importing.pipeline import Order, import_model
from training.importing.preprocessing import Wishes

OPSETS = range(9, 24)


def hush(_: str) -> None:
    """Say nothing."""


class Written:
    """A classifier as exporters wrote it at one opset: attributes became inputs, and outputs went."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.stored = {name: np.asarray(value) for name, value in Graph().weights().items()}
        self.stored["zeros"] = np.zeros(CLASSES, np.float32)

    def constant(self, name: str, values: list[int] | float) -> str:
        self.stored[name] = np.array(values, np.int64 if isinstance(values, list) else np.float32)
        return name

    def nodes(self) -> list[NodeProto]:
        norm = ["convolved", "gamma", "beta", "mean", "var"]
        return [
            self._pad(),
            helper.make_node("Conv", ["padded", "filters"], ["convolved"]),
            helper.make_node("BatchNormalization", norm, ["normed"], "norm"),
            self._dropout(),
            self._clip(),
            helper.make_node("AveragePool", ["clipped"], ["pooled"], kernel_shape=[SIDE, SIDE]),
            self._by_axes("Unsqueeze", "pooled", "longer", [4]),
            self._by_axes("Squeeze", "longer", "shorter", [2, 4]),
            helper.make_node("Reshape", ["shorter", self.constant("target", [-1, FILTERS])], ["features"]),
            self._by_axes("ReduceSum", "features", "total", [1], keepdims=1),
            helper.make_node("Sub", ["total", "total"], ["nothing"]),
            helper.make_node("Add", ["features", "nothing"], ["same"]),
            helper.make_node("Gemm", ["same", "matrix", *(["zeros"] if self.opset < 11 else [])], ["scores"], transB=1),
            helper.make_node("Softmax", ["scores"], ["probabilities"], **({"axis": 1} if self.opset < 13 else {})),
        ]

    def _pad(self) -> NodeProto:
        """Pad-11 made an input of the attribute."""
        pads = [0, 0, 1, 1, 0, 0, 1, 1]
        if self.opset < 11:
            return helper.make_node("Pad", ["x"], ["padded"], pads=pads, mode="constant", value=0.0)
        return helper.make_node("Pad", ["x", self.constant("pads", pads), self.constant("filling", 0.0)], ["padded"])

    def _dropout(self) -> NodeProto:
        """Dropout-12 made inputs of ratio and mode; the mask was always there to be had."""
        if self.opset < 12:
            return helper.make_node("Dropout", ["normed"], ["dropped", "mask"], ratio=0.5)
        return helper.make_node("Dropout", ["normed", self.constant("ratio", 0.5)], ["dropped", "mask"])

    def _clip(self) -> NodeProto:
        """Clip-11 made inputs of the attributes."""
        if self.opset < 11:
            return helper.make_node("Clip", ["dropped"], ["clipped"], min=0.0, max=6.0)
        return helper.make_node("Clip", ["dropped", self.constant("low", 0.0), self.constant("high", 6.0)], ["clipped"])

    def _by_axes(self, kind: str, source: str, target: str, axes: list[int], **attributes: int) -> NodeProto:
        """Squeeze, Unsqueeze and ReduceSum have taken their axes as an input since opset 13."""
        if self.opset < 13:
            return helper.make_node(kind, [source], [target], axes=axes, **attributes)
        return helper.make_node(kind, [source, self.constant(f"axes_{kind}", axes)], [target], **attributes)

    def model(self) -> onnx.ModelProto:
        nodes = self.nodes()
        stored = [numpy_helper.from_array(values, name) for name, values in self.stored.items()]
        ends = ([helper.make_tensor_value_info("x", 1, ["n", 3, SIDE, SIDE])],)
        ends += ([helper.make_tensor_value_info("probabilities", 1, ["n", CLASSES])],)
        graph = helper.make_graph(nodes, "old", *ends, stored)
        version = {"opset_imports": [helper.make_opsetid("", self.opset)], "ir_version": 4 if self.opset < 11 else 8}
        return helper.make_model(graph, **version)


@pytest.mark.parametrize("opset", OPSETS)
def test_a_file_of_each_opset_is_imported_folded_and_answers_alike(tmp_path: Path, opset: int):
    file = Written(opset).model()
    onnx.checker.check_model(file, full_check=True)
    onnx.save(file, tmp_path / "x.onnx")
    wishes = Wishes(mean=(0.5,), std=(0.25,))
    exported = import_model(Order(tmp_path / "x.onnx", "x", wishes), tmp_path / "models", say=hush)
    assert [record.norm for record in exported.manifest.folds] == ["norm"]
    assert exported.manifest.kept == ()
    assert exported.manifest.training["removed"] == "Softmax"
    artifact = Artifact.load(exported.folder)
    assert not {"BatchNormalization", "Softmax"} & {node.op_type for node in onnx.load(artifact.path).graph.node}
    pixels = np.random.default_rng(3).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
    logits = open_engine(artifact.model_bytes, choose_device("cpu")).run(pixels).astype(np.float64)
    np.testing.assert_allclose(logits, answers(pixels), rtol=0, atol=1e-5)  # 27 and 144 sums of values below 10


def answers(pixels: np.ndarray) -> np.ndarray:
    """Return what every one of the files means, in NumPy."""
    weights = {name: np.asarray(value, np.float64) for name, value in Graph().weights().items()}
    images = np.pad((pixels / 255 - 0.5).transpose(0, 3, 1, 2) / 0.25, [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), (2, 3))
    convolved = np.einsum("nchwij,kcij->nkhw", windows, weights["filters"])
    mean, var, gamma, beta = (weights[name].reshape(-1, 1, 1) for name in ("mean", "var", "gamma", "beta"))
    normed = (convolved - mean) / np.sqrt(var + 1e-5) * gamma + beta
    return normed.clip(0, 6).mean((2, 3)) @ weights["matrix"].T
