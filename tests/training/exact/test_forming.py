"""The exact form in an export: what is asked for, what is said, what is refused, and that nothing partial stays."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from training_support import hush

from service.artifact import Artifact
from service.independence.exactness import reference_logits
from service.integers import read_steps
from training.errors import ExportRefused
from training.exact.options import ExactOptions
from training.export import Exported, export
from training.run import Trained

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def _without_images(trained: Trained) -> Trained:
    """Return a run whose training part is too small to calibrate with."""
    few = replace(trained.dataset.training, images=trained.dataset.training.images[:9])
    return replace(trained, dataset=replace(trained.dataset, training=few))


def test_an_export_of_digits_keeps_its_accuracy_within_a_tenth_of_a_point(exported: Exported, trained: Trained):
    artifact = Artifact.load(exported.folder, "exact")
    record = artifact.manifest.exact
    assert record is not None
    images = trained.dataset.validation.images
    found = reference_logits(read_steps(onnx.load_model_from_string(artifact.model_bytes)), images).argmax(1)
    accuracy = float((found == trained.dataset.validation.targets).mean())
    assert record.accuracy == accuracy
    assert record.float_accuracy - accuracy <= 0.001 + 1e-9


def test_off_is_silent_and_writes_the_float_form_alone(tmp_path: Path, trained: Trained):
    said: list[str] = []
    done = export(trained, tmp_path, "digits", exact=ExactOptions("off"), say=said.append)
    assert not [line for line in said if "exact" in line]
    assert {path.name for path in done.folder.iterdir()} == {"model.onnx", "golden.npz", "README.md"}


def test_auto_goes_on_without_an_exact_form_and_says_why(tmp_path: Path, trained: Trained):
    said: list[str] = []
    done = export(_without_images(trained), tmp_path, "digits", say=said.append)
    assert any(line.startswith("no exact form: calibration needs at least 64") for line in said)
    assert not (done.folder / "exact.onnx").exists()
    assert done.exact_bytes == 0


def test_require_refuses_with_the_reason_and_writes_nothing(tmp_path: Path, trained: Trained):
    wish = ExactOptions("require")
    with pytest.raises(ExportRefused, match=r"no exact form: calibration needs at least 64.*--exact auto"):
        export(_without_images(trained), tmp_path / "models", "digits", exact=wish, say=hush)
    assert list(tmp_path.rglob("*")) == [] or not list((tmp_path / "models").rglob("*"))


def test_a_larger_drop_than_allowed_is_refused_with_the_figures_and_nothing_is_written(
    tmp_path: Path, trained: Trained
):
    twin = tmp_path / "twin.onnx"
    options = ExactOptions("auto", -100.0, twin)  # no drop is so small
    with pytest.raises(
        ExportRefused, match=r"loses -?\d+\.\d\d points .*\(\d+\.\d\d% → \d+\.\d\d%\), allowed are -100"
    ):
        export(trained, tmp_path / "models", "digits", exact=options, say=hush)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "models"])
    assert not list((tmp_path / "models").rglob("*"))


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, trained: Trained) -> tuple[Path, Exported]:
    folder = tmp_path_factory.mktemp("twin")
    done = export(trained, folder / "models", "digits", exact=ExactOptions(float_twin=folder / "twin.onnx"), say=hush)
    return folder / "twin.onnx", done


@pytest.mark.parametrize("level", LEVELS)
def test_the_float_twin_has_the_same_bits_in_plain_onnxruntime_at_every_level(twin, trained: Trained, level: str):
    path, done = twin
    images = trained.dataset.test.images
    wanted = reference_logits(read_steps(onnx.load(done.folder / "exact.onnx")), images)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for batch in (1, 7, 64):
        found = session.run(None, {"image": images[:batch]})[0]
        np.testing.assert_array_equal(found.view(np.uint32), wanted[:batch].view(np.uint32))


def test_the_float_twin_is_of_standard_operators_alone(twin):
    model = onnx.load(twin[0])
    onnx.checker.check_model(model, full_check=True)
    assert [one.domain for one in model.opset_import] == [""]
    assert {node.op_type for node in model.graph.node}.isdisjoint({"QLinearConv", "MatMulInteger", "QuantizeLinear"})


class _Interrupted:
    """Says nothing until a step, then presses Ctrl-C."""

    def __init__(self, step: str) -> None:
        self.step = step

    def __call__(self, line: str) -> None:
        if self.step in line:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["calibrating", "every execution"])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, trained: Trained, step: str):
    options = ExactOptions(float_twin=tmp_path / "twin.onnx")
    with pytest.raises(KeyboardInterrupt):
        export(trained, tmp_path / "models", "digits", exact=options, say=_Interrupted(step))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
