"""A file from elsewhere, imported by the command line, certified and served by a real server."""

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from e2e_support import post
from foreign_support import SIDE, Graph
from onnx.reference import ReferenceEvaluator
from PIL import Image

from foldserve.cli import main

pytestmark = pytest.mark.e2e


def test_a_keras_style_file_is_served_with_the_answers_that_it_gave(tmp_path: Path, start):
    graph = Graph(batch=1, channels_last=True, softmax=True, epsilon=1e-3, input_name="input_1:0")
    (tmp_path / "labels.txt").write_text("cat\ndog\nowl\nfox\n")
    flags = ["--labels", str(tmp_path / "labels.txt"), "--mean", "0.5", "--std", "0.5"]
    models = tmp_path / "models"
    assert main(["import", str(graph.write(tmp_path)), "--name", "foreign", "--models", str(models), *flags]) == 0
    server = start("--models", str(models))
    pixels = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0]).save(buffer, format="PNG")
    answer = post(server.url, buffer.getvalue(), headers={"content-type": "image/png"})
    assert answer.status_code == 200
    (prediction,) = answer.json()["predictions"]
    (wanted,) = ReferenceEvaluator(graph.model()).run(None, {"input_1:0": (pixels / 127.5 - 1).astype(np.float32)})
    assert prediction["index"] == wanted.argmax()
    assert prediction["label"] == ("cat", "dog", "owl", "fox")[wanted.argmax()]
    assert abs(prediction["score"] - wanted.max()) < 1e-5  # float32 in the file, float64 in the service
    assert "foldserve-certificate" in answer.headers
    kinds = {node.op_type for node in onnx.load(models / "foreign" / "1" / "model.onnx").graph.node}
    assert not kinds & {"BatchNormalization", "Softmax"}
