"""The three ways of one network for two domains, trained, and one folded artifact for each domain."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_support import QUICK, hush

from foldserve.cli import main
from service.artifact import Artifact
from service.engine import choose_device, open_engine
from training.batches import SHARED_MIXED, plan
from training.run import load_run, train

CONFIG = replace(
    QUICK, dataset="digits+folder:negative", size=8, mode="L", validation_images=300, limit_images=800, epochs=2,
    workers=0, batch_size=32, domains="separate",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(domain_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "separate"
    train(CONFIG, folder, data_dir=domain_data, say=hush)
    return folder


@pytest.mark.parametrize("way", ["union", "batches", "separate"])
def test_each_domain_gives_as_many_images_and_batches_are_mixed_or_pure(way: str):
    domains = np.repeat([0, 1], [100, 30])
    planned = plan(domains, replace(CONFIG, domains=way, batch_size=10), 1)
    assert len(planned) == 20
    seen = np.concatenate([domains[one.indices] for one in planned])
    assert np.bincount(seen).tolist() == [100, 100]
    for one in planned:
        found = set(domains[one.indices])
        assert one.domain == SHARED_MIXED or found == {one.domain}
    assert any(len(set(domains[one.indices])) == 2 for one in planned) == (way == "union")
    larger = [index for one in planned for index in one.indices if index < 100]
    assert len(set(larger)) == 100, "of the largest domain each image is there once"


@pytest.mark.parametrize("way", ["union", "batches"])
def test_shared_batchnorm_gives_one_result_over_both_domains(tmp_path: Path, domain_data: Path, way: str):
    result = train(replace(CONFIG, domains=way, epochs=1), tmp_path / "run", data_dir=domain_data, say=hush)
    assert set(result["domains"]) == {"digits", "negative"}
    assert load_run(tmp_path / "run", domain_data).by_domain() == {}


def test_a_separate_run_is_exported_as_one_folded_artifact_a_domain(
    tmp_path: Path, domain_data: Path, run: Path, capsys
):
    models = tmp_path / "models"
    code = main(["export", str(run), "--name", "ours", "--models", str(models), "--data-dir", str(domain_data)])
    assert code == 0
    assert sorted(path.name for path in models.iterdir()) == ["ours-digits", "ours-negative"]
    trained = load_run(run, domain_data)
    results = json.loads((run / "result.json").read_text())
    for domain in trained.dataset.domains:
        artifact = Artifact.load(models / f"ours-{domain}" / "1")
        assert artifact.manifest.kept == ()
        assert len(artifact.manifest.folds) == 4
        assert artifact.manifest.training["dataset"] == domain
        assert {record.initial_share for record in artifact.manifest.batchnorm} == {0.0}
        engine = open_engine(artifact.model_bytes, choose_device("cpu"))
        test = trained.dataset.of_domain(domain).test
        labelled = engine.run(np.ascontiguousarray(test.images)).argmax(1)
        # float32 rounding may turn a tie of two classes: a few images
        assert (labelled == test.targets).mean() == pytest.approx(results["domains"][domain], abs=0.01)


def test_an_evaluation_gives_each_domain_its_own_batchnorm(tmp_path: Path, domain_data: Path, run: Path):
    assert main(["evaluate", str(run), "--data-dir", str(domain_data), "--out", str(tmp_path)]) == 0
    result = json.loads((run / "result.json").read_text())
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    assert numbers["accuracy"] == pytest.approx(result["test_accuracy"], abs=1e-9)
    assert min(result["domains"].values()) > 0.3, "with the other domain's BatchNorm they would be guesses"


def test_a_card_gets_the_numbers_of_the_one_domain_that_its_artifact_holds(
    tmp_path: Path, domain_data: Path, run: Path
):
    models, data = tmp_path / "models", ["--data-dir", str(domain_data)]
    assert main(["export", str(run), "--name", "ours", "--models", str(models), *data]) == 0
    results = json.loads((run / "result.json").read_text())["domains"]
    for domain, accuracy in results.items():
        folder = models / f"ours-{domain}" / "1"
        assert main(["evaluate", str(run), "--out", str(tmp_path / "out"), "--card", str(folder), *data]) == 0
        images = len(load_run(run, domain_data).dataset.of_domain(domain).test)
        card = (folder / "README.md").read_text().partition("## Evaluation")[2]
        assert f"{accuracy:.2%} of {images:,} test images" in card
    assert main(["evaluate", str(run), "--out", str(tmp_path / "out"), "--card", str(tmp_path), *data]) == 1


def test_a_separate_run_is_examined_with_images_of_a_domain_where_its_data_lies(
    domain_data: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.delenv("FOLDSERVE_DATA", raising=False)
    images = next(domain_data.rglob("*.png")).parent
    where = ["--data-dir", str(domain_data)]
    main(["inspect", str(run), "--data", str(images), *where, "--domain", "negative", "--json"])
    drift = json.loads(capsys.readouterr().out)["data"]["drift"]
    assert len(drift) == 4
    assert all(".domains.negative" in one["layer"] for one in drift)
