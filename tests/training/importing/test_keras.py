"""Files that Keras wrote: `benchmarks/keras_export.py` made them with TensorFlow 2.21, Keras 3.15 and tf2onnx 1.17."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from foldserve.cli import main
from service.artifact import Artifact
from service.engine import choose_device, open_engine
from training.importing.pipeline import Order, import_model
from training.importing.preprocessing import Wishes

DATA = Path(__file__).parents[2] / "data"
FILES = ["keras_small_tf2onnx.onnx", "keras_small_export.onnx"]
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_keras_answers_as_it_did_with_its_own_rescaling(tmp_path: Path, name: str):
    lines: list[str] = []
    exported = import_model(Order(DATA / name, "keras"), tmp_path / "models", say=lines.append)
    artifact = Artifact.load(exported.folder)
    logits = open_engine(artifact.model_bytes, choose_device("cpu")).run(PIXELS).astype(np.float64)
    found = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    file = onnx.load(DATA / name)
    (wanted,) = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: PIXELS.astype(np.float32)})
    # a probability moves by at most as much as a logit: here 2e-6, and both sides are rounded in float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert "note     the graph begins with Mul by 0.007843: it scales pixels 0–255 itself" in "\n".join(lines)


@pytest.mark.parametrize("name", FILES)
def test_the_batchnorm_that_keras_left_as_arithmetic_is_folded(tmp_path: Path, name: str):
    exported = import_model(Order(DATA / name, "keras"), tmp_path / "models", say=lambda _: None)
    assert [record.kind for record in exported.manifest.folds] == ["Conv", "MatMul"]
    (kept,) = exported.manifest.kept  # before a convolution, and its input is added to what comes of it
    assert "is used elsewhere too" in kept.reason


def test_preprocessing_that_would_scale_twice_is_told(tmp_path: Path):
    lines: list[str] = []
    order = Order(DATA / FILES[0], "keras", Wishes(mean=(0.5,), std=(0.5,)))
    import_model(order, tmp_path / "models", say=lines.append)
    assert any(line.startswith("warning  the graph begins with Mul") for line in lines)


def test_pixels_from_0_to_255_asked_for_are_no_reason_to_warn(tmp_path: Path, capsys):
    flags = ["--mean", "0", "--std", "0.00392157", "--models", str(tmp_path / "models")]
    assert main(["import", str(DATA / FILES[0]), "--name", "keras", *flags]) == 0
    assert "scales pixels" not in capsys.readouterr().out
