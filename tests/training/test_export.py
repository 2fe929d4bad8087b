"""`training.export`: what lies in models/<name>/<version> after an export."""

import copy
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn
from training_support import QUICK, hush

from service.artifact import MANIFEST_KEY, Artifact
from service.engine import choose_device, open_engine
from training.data import Split
from training.export import export, real_images
from training.loop import Normalize
from training.normalization import batch_norms
from training.packaging import GOLDEN_ROOM, Exported
from training.parity import Reference, check
from training.run import Trained


@pytest.fixture(scope="session")
def model(exported: Exported) -> onnx.ModelProto:
    return onnx.load(exported.folder / "model.onnx")


@pytest.fixture(scope="session")
def artifact(exported: Exported) -> Artifact:
    return Artifact.load(exported.folder)


def float64_logits(trained: Trained, images: np.ndarray) -> np.ndarray:
    """Return the answers of the trained network itself, nothing folded, nothing converted."""
    model = nn.Sequential(Normalize(trained.pixels.mean, trained.pixels.std), trained.network)
    module = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return module(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def test_the_first_version_is_1_with_the_documented_files(exported: Exported):
    assert exported.folder.parts[-2:] == ("digits", "1")
    assert {path.name for path in exported.folder.iterdir()} == {"exact.onnx", "model.onnx", "golden.npz", "README.md"}
    assert [path.name for path in exported.folder.parent.iterdir()] == ["1"], "nothing partial is left"


def test_no_batchnorm_is_left_in_the_graph(model: onnx.ModelProto):
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Conv"] > 0
    assert kinds["BatchNormalization"] == 0


def test_opset_and_interface_are_the_contracts(model: onnx.ModelProto):
    assert {entry.domain: entry.version for entry in model.opset_import}[""] >= 20
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    batches = [value.type.tensor_type.shape.dim[0] for value in (image, logits)]
    assert all(batch.dim_param for batch in batches), "the batch is symbolic"
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]] for value in (image, logits)]
    assert shapes == [[8, 8, 1], [10]]
    onnx.checker.check_model(model, full_check=True)


def test_pixels_are_transposed_while_they_are_bytes(model: onnx.ModelProto):
    order = [node.op_type for node in model.graph.node]
    assert order.index("Transpose") < order.index("Cast")


def test_the_file_tells_nothing_about_the_machine_that_made_it(exported: Exported, model: onnx.ModelProto):
    content = (exported.folder / "model.onnx").read_bytes() + (exported.folder / "golden.npz").read_bytes()
    root = Path(__file__).resolve().parents[2]
    for secret in (str(root), sys.prefix, str(Path.home()), str(exported.folder.parents[1]), "/tmp/"):
        if len(secret) > 4:  # "/" is no secret
            assert secret.encode() not in content, secret
    for trace in (
        b"stack_trace",
        b"Traceback",
        b".py:",
        b'.py"',
        b"site-packages",
        b"line ",
        b"pkg.torch",
        b"doc_string",
    ):
        assert trace not in content, trace
    entries = [*model.graph.node, *model.graph.value_info, *model.graph.initializer]
    entries += [*model.graph.input, *model.graph.output, model.graph]
    assert all(entry.doc_string == "" and not entry.metadata_props for entry in entries)
    assert [entry.key for entry in model.metadata_props] == [MANIFEST_KEY]
    assert model.doc_string == ""


def test_the_manifest_is_complete(exported: Exported, artifact: Artifact, trained: Trained):
    manifest = artifact.manifest
    assert manifest == exported.manifest
    assert (manifest.name, manifest.labels) == ("digits", tuple("0123456789"))
    names = [name for name, _ in batch_norms(trained.network)]
    assert [record.norm for record in manifest.folds] == names
    assert all(record.error is not None and record.error <= 1e-10 for record in manifest.folds)
    assert manifest.kept == ()
    assert [record.norm for record in manifest.batchnorm] == names
    steps = QUICK.epochs * (len(trained.dataset.training) // QUICK.batch_size)
    best_steps = steps * trained.result["best_epoch"] // QUICK.epochs
    assert {record.num_batches_tracked for record in manifest.batchnorm} == {best_steps}
    spec = manifest.preprocessing
    assert (spec.mode, spec.size, spec.mean, spec.std) == ("L", (8, 8), trained.pixels.mean, trained.pixels.std)
    assert manifest.training == trained.result
    assert {"dataset", "split", "seed", "test_accuracy", "versions", "commit", "date"} <= set(manifest.training)
    assert manifest.pixels == trained.pixels
    assert "CC BY 4.0" in str(manifest.licence)


def test_parity_was_seen_on_a_thousand_real_images_at_four_batch_sizes(exported: Exported):
    assert exported.parity.images >= 1000
    assert exported.parity.batch_sizes == (1, 2, 7, 64)
    assert 0 < exported.parity.max_abs_difference <= 8 * exported.parity.float32_noise


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_the_artifact_computes_what_the_trained_network_computes(artifact, trained: Trained, batch_size: int):
    engine = open_engine(artifact.model_bytes, choose_device("cpu"))
    images = real_images(trained)[: 2 * batch_size]
    wanted = float64_logits(trained, images)
    found = np.concatenate([engine.run(images[:batch_size]), engine.run(images[batch_size:])])
    assert found.dtype == np.float32
    # what the export saw over its thousand images bounds these, which are among them
    assert np.abs(found - wanted).max() <= artifact.manifest.parity.max_abs_difference


def test_checked_images_are_real_and_test_images_come_first(trained: Trained):
    images = real_images(trained)
    assert len(images) == 1000
    np.testing.assert_array_equal(images[:360], trained.dataset.test.images)
    known = {image.tobytes() for image in trained.dataset.validation.images}
    assert all(image.tobytes() in known for image in images[360:])


def test_golden_answers_are_those_of_the_unfolded_network_in_float64(artifact: Artifact, trained: Trained):
    golden = artifact.golden
    assert len(golden.encoded) >= 8
    # a thousand images were run 250 at a time, here 16: float64 sums in another order
    np.testing.assert_allclose(golden.logits_float64, float64_logits(trained, golden.pixels), rtol=0, atol=1e-11)
    real = {image.tobytes() for image in real_images(trained)}
    assert all(pixels.tobytes() in real for pixels in golden.pixels)
    assert len({pixels.tobytes() for pixels in golden.pixels}) == len(golden.pixels)


def test_the_golden_tolerance_is_four_times_the_largest_difference_seen(artifact: Artifact, exported: Exported):
    assert GOLDEN_ROOM == 4
    assert artifact.golden.tolerance == 4 * exported.parity.max_abs_difference
    engine = open_engine(artifact.model_bytes, choose_device("cpu"))
    assert artifact.golden.check(engine.run, artifact.manifest.preprocessing) <= exported.parity.max_abs_difference


def test_golden_images_are_files_that_anyone_can_read(artifact: Artifact, tmp_path: Path):
    for encoded, pixels in zip(artifact.golden.encoded, artifact.golden.pixels, strict=True):
        (tmp_path / "golden.png").write_bytes(encoded)
        with Image.open(tmp_path / "golden.png") as image:
            np.testing.assert_array_equal(np.array(image), pixels[..., 0])


def test_golden_answers_are_read_without_pickle(exported: Exported):
    with np.load(exported.folder / "golden.npz", allow_pickle=False) as arrays:
        kinds = {name: arrays[name].dtype for name in arrays.files}
    assert kinds["encoded"] == kinds["pixels"] == np.uint8
    assert kinds["offsets"] == np.int64
    assert kinds["logits_float64"] == kinds["tolerance"] == np.float64


def test_the_card_says_what_the_model_is(exported: Exported):
    card = (exported.folder / "README.md").read_text()
    result = exported.manifest.training
    assert card.startswith("# digits, version 1\n")
    for fact in (exported.digest, f"{result['test_accuracy']:.2%}", "CC BY 4.0", "largest difference", result["split"]):
        assert fact in card
    for record in exported.manifest.folds:
        assert re.search(rf"^{re.escape(record.norm)} +{re.escape(record.into)} +Conv2d", card, re.MULTILINE)


def test_each_export_is_the_next_version_whatever_else_lies_there(tmp_path: Path, trained: Trained, exported: Exported):
    for name in ("3", "9x", "007", ".partial-1"):
        (tmp_path / "digits" / name).mkdir(parents=True)
    again = export(trained, tmp_path, "digits", say=hush)
    assert again.folder == tmp_path / "digits" / "4"
    model = (again.folder / "model.onnx").read_bytes()
    assert model == (exported.folder / "model.onnx").read_bytes(), "the same run gives the same file"


def test_a_batchnorm_that_stays_is_in_the_graph_and_in_the_manifest(tmp_path: Path, trained: Trained):
    class AfterRelu(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

        def forward(self, images):
            features = torch.relu(self.norm(torch.relu(self.conv(images))))
            return self.head(features.mean((2, 3)))

    torch.manual_seed(0)
    network = AfterRelu()
    network(torch.randn(64, 1, 8, 8))
    kept = export(replace(trained, network=network.eval()), tmp_path, "kept", say=hush)
    assert [record.norm for record in kept.manifest.kept] == ["norm"]
    nodes = [node.op_type for node in onnx.load(kept.folder / "model.onnx").graph.node]
    assert nodes.count("BatchNormalization") == 1


def test_a_small_data_set_is_checked_with_all_its_images_at_full_batches(tmp_path: Path, trained: Trained):
    few = Split(trained.dataset.test.images[:10], trained.dataset.test.targets[:10])
    dataset = replace(trained.dataset, training=few, validation=few, test=few)
    small = export(replace(trained, dataset=dataset), tmp_path / "models", "digits", say=hush)
    assert (small.parity.images, small.parity.batch_sizes) == (30, (1, 2, 7, 64))
    Artifact.load(small.folder)


def test_images_that_do_not_fill_a_batch_are_repeated_in_it():
    images, sizes = np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1), set()

    def run(batch):
        sizes.add(len(batch))
        return batch.reshape(len(batch), 1).astype(np.float32)

    seen = check(run, images, Reference(np.arange(30.0).reshape(30, 1), float32_noise=0.0))
    assert (max(sizes), seen.images, seen.max_abs_difference) == (64, 30, 0.0)
