"""`training.export`: what is refused, and that nothing is written then."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_support import hush

from service.errors import ArtifactError
from service.golden import Golden
from training import export as exporting
from training import packaging
from training.data import Split
from training.errors import ExportRefused, NotFoldable, UsageError
from training.export import export
from training.folding.modules import fold, verify
from training.normalization import batch_norms
from training.packaging import Exported
from training.parity import check
from training.run import Trained


def _written(models: Path) -> list[Path]:
    return list(models.rglob("*")) if models.exists() else []


@pytest.mark.parametrize(
    "name", ["", ".hidden", "-flag", "a/b", "../up", "two words", "ä", "x" * 101, "name\n", "a\x00b", "C:\\x"]
)
def test_a_bad_name_is_refused(tmp_path: Path, trained: Trained, name: str):
    with pytest.raises(UsageError, match="--name"):
        export(trained, tmp_path / "models", name, say=hush)
    assert _written(tmp_path) == []


def _training_mode(norm: torch.nn.BatchNorm2d) -> None:
    norm.train()


def _never_updated(norm: torch.nn.BatchNorm2d) -> None:
    norm.num_batches_tracked.zero_()


def _reset(norm: torch.nn.BatchNorm2d) -> None:
    norm.running_mean.zero_()
    norm.running_var.fill_(1)


def _poisoned(norm: torch.nn.BatchNorm2d) -> None:
    norm.running_var[0] = torch.inf


@pytest.mark.parametrize("damage", [_training_mode, _never_updated, _reset, _poisoned])
def test_a_network_with_untrustworthy_batchnorm_is_refused_by_layer(tmp_path: Path, trained: Trained, damage):
    network = copy.deepcopy(trained.network)
    name, norm = list(batch_norms(network))[1]
    damage(norm)
    with pytest.raises(NotFoldable, match=f"BatchNorm {name}"):
        export(replace(trained, network=network), tmp_path / "models", "digits", say=hush)
    assert _written(tmp_path) == []


def test_parity_refuses_an_engine_that_computes_another_network(trained: Trained, exported: Exported):
    """The check that `export` makes, with the reference of a network whose one γ is 0.1 % larger."""
    images = exporting.real_images(trained)
    other = copy.deepcopy(trained.network)
    with torch.no_grad():
        next(norm for _, norm in batch_norms(other)).weight.mul_(1.001)
    normalize = exporting.Normalize(trained.pixels.mean, trained.pixels.std)
    wrong = exporting.parity.reference(exporting.Classifier(normalize, fold(other).unfolded), images)
    right = exporting.parity.reference(exporting.Classifier(normalize, fold(trained.network).unfolded), images)
    model_bytes = (exported.folder / "model.onnx").read_bytes()
    engine = exporting.open_engine(model_bytes, exporting.choose_device("cpu"))
    check(engine.run, images, right)
    with pytest.raises(ExportRefused, match="nothing was written"):
        check(engine.run, images, wrong)


def test_nothing_is_written_when_parity_fails(tmp_path: Path, trained: Trained):
    """Weights beyond float32's range: float64 has an answer, float32 has infinity."""
    network = copy.deepcopy(trained.network).double()
    with torch.no_grad():
        next(network.children())[0].weight.mul_(1e45)
    with pytest.raises((ExportRefused, NotFoldable)):
        export(replace(trained, network=network), tmp_path / "models", "digits", say=hush)
    assert _written(tmp_path) == []


def test_too_few_real_images_are_refused(tmp_path: Path, trained: Trained):
    few = Split(trained.dataset.test.images[:2], trained.dataset.test.targets[:2])
    dataset = replace(trained.dataset, training=few, validation=few, test=few)
    with pytest.raises(ExportRefused, match="needs 8 real images, the data set has 6; add some"):
        export(replace(trained, dataset=dataset), tmp_path / "models", "digits", say=hush)
    assert _written(tmp_path) == []


def _golden(exported: Exported, **changed) -> Golden:
    golden = Golden.from_file(exported.folder / "golden.npz")
    return replace(golden, **changed)


def _model(exported: Exported) -> bytes:
    return (exported.folder / "model.onnx").read_bytes()


def test_an_artifact_that_fails_its_own_golden_images_is_not_written(tmp_path: Path, exported: Exported):
    golden = _golden(exported)
    golden.logits_float64[3, 2] += 1e-3
    with pytest.raises(ExportRefused, match=r"fails its own golden images: golden image 3.*nothing was written"):
        packaging.write(tmp_path / "models", exported.manifest, _model(exported), golden)
    assert not [path for path in _written(tmp_path) if path.is_file() or path.name.startswith(".")]
    assert not (tmp_path / "models" / "digits" / "1").exists()


def test_golden_pixels_that_decode_otherwise_are_not_written(tmp_path: Path, exported: Exported):
    golden = _golden(exported)
    golden.pixels[0, 0, 0, 0] ^= 1
    with pytest.raises(ExportRefused, match="golden image 0 decodes to other pixels"):
        packaging.write(tmp_path / "models", exported.manifest, _model(exported), golden)
    assert not (tmp_path / "models" / "digits" / "1").exists()


def test_an_artifact_that_the_service_could_not_read_is_one_clear_refusal(tmp_path: Path, exported: Exported):
    half = _golden(exported, logits_float64=np.zeros((16, 7)), logits_exact=None)
    with pytest.raises((ArtifactError, ExportRefused), match="belongs to another model"):
        packaging.write(tmp_path / "models", exported.manifest, _model(exported), half)
    assert not (tmp_path / "models" / "digits" / "1").exists()


def test_a_repository_that_cannot_be_written_is_refused(tmp_path: Path, exported: Exported):
    (tmp_path / "models").write_text("a file is in the way")
    with pytest.raises(ExportRefused, match="cannot be written"):
        packaging.write(tmp_path / "models", exported.manifest, _model(exported), _golden(exported))


def test_an_export_leaves_the_trained_network_as_it_was(tmp_path: Path, trained: Trained):
    before = copy.deepcopy(trained.network.state_dict())
    export(trained, tmp_path, "again", say=hush)
    assert {value.dtype for value in trained.network.state_dict().values()} == {torch.float32, torch.int64}
    assert all(torch.equal(value, before[name]) for name, value in trained.network.state_dict().items())


def test_a_fold_that_was_tampered_with_does_not_pass_the_exports_own_check(trained: Trained):
    images = torch.from_numpy(exporting.real_images(trained)[:16]).permute(0, 3, 1, 2)
    normalized = exporting.Normalize(trained.pixels.mean, trained.pixels.std)(images)
    folded = fold(trained.network)
    verify(folded, normalized)
    with torch.no_grad():
        folded.module.get_submodule(folded.folds[-1].into).bias += 1e-7
    with pytest.raises(NotFoldable, match="folded and unfolded differ"):
        verify(folded, normalized)
