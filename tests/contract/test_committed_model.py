"""The model that the repository brings along: what it claims, it does."""

from pathlib import Path

import numpy as np
import pytest
from training_support import real_data

from service.artifact import Artifact
from service.engine import choose_device, open_engine
from training.data import IDX_SOURCES, find_idx, read_idx

FOLDER = Path(__file__).resolve().parents[2] / "models" / "mnist" / "1"
REAL_DATA = real_data()

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="models/mnist/1 is not in this checkout")


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return Artifact.load(FOLDER)


def test_it_passes_its_golden_images(artifact: Artifact):
    engine = open_engine(artifact.model_bytes, choose_device("cpu"))
    assert artifact.golden.check(engine.run, artifact.manifest.preprocessing) <= artifact.golden.tolerance
    assert len(artifact.golden.encoded) >= 8


def test_it_is_under_a_megabyte_with_all_that_lies_beside_it():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000


def test_it_folded_every_batchnorm_and_claims_995_per_mille(artifact: Artifact):
    manifest = artifact.manifest
    assert manifest.kept == ()
    assert len(manifest.folds) == len(manifest.batchnorm) > 0
    assert manifest.training["test_accuracy"] >= 0.995
    assert manifest.training["dataset"] == manifest.name == "mnist"
    assert manifest.labels == tuple("0123456789")
    assert all(record.initial_share is None or record.initial_share < 1e-6 for record in manifest.batchnorm)


def test_its_card_is_that_of_this_file(artifact: Artifact):
    assert artifact.digest in (FOLDER / "README.md").read_text()


@pytest.mark.skipif(REAL_DATA is None, reason="FOLDSERVE_DATA names no folder of real data")
def test_it_labels_995_per_mille_of_the_mnist_test_set_and_exactly_as_many_as_it_claims(artifact: Artifact):
    source = IDX_SOURCES["mnist"]
    folder = find_idx("mnist", source, [REAL_DATA], download=False)
    images, targets = (
        read_idx(folder / f"{stem}.gz", source.sha256[stem])
        for stem in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    )
    engine = open_engine(artifact.model_bytes, choose_device("cpu"))
    logits = np.concatenate([engine.run(batch) for batch in np.split(images[..., np.newaxis], 100)])
    accuracy = (logits.argmax(1) == targets).mean()
    assert accuracy >= 0.995
    # labels of near ties may flip between runtimes, which parity counted at export on a tenth of these images
    flips = 10 * (artifact.manifest.parity.argmax_flips + 1)
    assert abs(accuracy - artifact.manifest.training["test_accuracy"]) * len(targets) <= flips
