"""Statistics in a file that counts no batches: judged by their looks, over all layers together."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_support import FILTERS, Graph
from onnx import helper, numpy_helper

from training.doctor.examine import examine
from training.doctor.read import onnx_subject
from training.foreign.read import load_onnx

COLD = {"mean": np.full(FILTERS, 0.01), "var": np.linspace(0.95, 1.05, FILTERS)}


def with_second_norm(variance: np.ndarray) -> onnx.ModelProto:
    """Return a network whose first BatchNorm looks cold, with a second one after its ReLU."""
    model = Graph(values=COLD).model()
    pool = next(node for node in model.graph.node if node.op_type == "GlobalAveragePool")
    pool.input[0] = "again"
    names = ["positive", "gamma", "beta", "mean", "second_var"]
    second = helper.make_node("BatchNormalization", names, ["again"], name="second")
    model.graph.node.insert(list(model.graph.node).index(pool), second)
    model.graph.initializer.append(numpy_helper.from_array(variance.astype(np.float32), "second_var"))
    return model


@pytest.mark.parametrize(
    ("variance", "errors"),
    [(np.linspace(0.91, 7, FILTERS), ["initial-statistics"]), (np.linspace(0.4, 7, FILTERS), [])],
    ids=["another layer allows it", "another layer contradicts it"],
)
def test_a_variance_below_the_initial_share_anywhere_clears_the_file(tmp_path: Path, variance, errors: list[str]):
    onnx.save(with_second_norm(variance), tmp_path / "two.onnx")
    report = examine(onnx_subject(tmp_path / "two.onnx", load_onnx(tmp_path / "two.onnx")))
    assert [finding.check for finding in report.errors] == errors
