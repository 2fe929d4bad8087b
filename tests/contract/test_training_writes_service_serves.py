"""What `training` exports, `service` loads and serves: the same pixels, the same numbers, over HTTP."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest

from service.app import create_app
from service.artifact import MANIFEST_KEY, Artifact
from service.config import Settings
from service.engine import choose_device, open_engine
from service.errors import ArtifactError
from service.repository import Repository
from training.packaging import Exported

LOADING_S = 60  # far beyond what a 300 kB model takes; reached only where loading hangs


@asynccontextmanager
async def served(models: Path, form: str) -> AsyncIterator[httpx.AsyncClient]:
    """Run the whole service in this process, ready, and give a client of it."""
    app = create_app(Settings(models=models, device="cpu", form=form))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service") as client,
        asyncio.timeout(LOADING_S),
    ):
        while (await client.get("/readyz")).status_code != 200:
            assert app.state.service.status == "loading", "loading failed"
            await asyncio.sleep(0)
        yield client


def ask(models: Path, encoded: tuple[bytes, ...], *, together: bool, form: str = "float") -> list[dict]:
    """Return the predictions of golden images, in one request or in one each."""

    async def conversation() -> list[dict]:
        async with served(models, form) as client:
            files = [("file", (f"{index}.png", image, "image/png")) for index, image in enumerate(encoded)]
            bodies = [files] if together else [[file] for file in files]
            answers = [await client.post("/predict", params={"logits": "true"}, files=body) for body in bodies]
            assert {answer.status_code for answer in answers} == {200}, answers[0].text
            return [one for answer in answers for one in answer.json()["predictions"]]

    return asyncio.run(conversation())


@pytest.mark.parametrize("together", [True, False], ids=["one request", "a request each"])
def test_golden_images_get_golden_answers_over_http(models: Path, exported: Exported, together):
    golden = Artifact.load(exported.folder).golden
    predictions = ask(models, golden.encoded, together=together)
    logits = np.array([prediction["logits"] for prediction in predictions])
    assert np.abs(logits - golden.logits_float64).max() <= golden.tolerance
    assert [prediction["index"] for prediction in predictions] == golden.logits_float64.argmax(1).tolist()


@pytest.mark.parametrize("together", [True, False], ids=["one request", "a request each"])
def test_the_exact_form_gives_its_golden_bits_over_http(models: Path, exported: Exported, together):
    golden = Artifact.load(exported.folder, "exact").golden
    predictions = ask(models, golden.encoded, together=together, form="exact")
    logits = np.array([prediction["logits"] for prediction in predictions], np.float32)
    assert golden.logits_exact is not None
    assert logits.tobytes() == golden.logits_exact.tobytes()


def test_scores_are_the_softmax_of_the_networks_own_logits(models: Path, exported: Exported):
    golden = Artifact.load(exported.folder).golden
    predictions = ask(models, golden.encoded, together=True)
    exponentials = np.exp(golden.logits_float64 - golden.logits_float64.max(1, keepdims=True))
    scores = (exponentials / exponentials.sum(1, keepdims=True)).max(1)
    found = [prediction["score"] for prediction in predictions]
    # a softmax moves by at most twice what its logits move by, relative
    np.testing.assert_allclose(found, scores, rtol=2 * golden.tolerance + 1e-12)


def test_the_repository_loads_what_was_exported_and_runs_its_golden_images(models: Path, exported: Exported):
    repository = Repository(models, open_engine, "float")
    assert repository.names() == ["digits"]
    model = repository.load("digits", choose_device("cpu"))
    assert (model.version, model.digest, model.manifest) == (1, exported.digest, exported.manifest)
    assert model.golden_images >= 8
    assert model.golden_difference <= Artifact.load(exported.folder).golden.tolerance


def test_an_artifact_whose_weights_changed_is_not_served(tmp_path: Path, models: Path):
    broken = shutil.copytree(models, tmp_path / "models")
    path = broken / "digits" / "1" / "model.onnx"
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = np.frombuffer(weight.raw_data, np.float32).copy()
    values *= 1.01
    weight.raw_data = values.tobytes()
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match="golden image"):
        Repository(broken, open_engine).load("digits", choose_device("cpu"))


def test_an_artifact_whose_normalization_changed_is_not_served(tmp_path: Path, models: Path):
    """The graph applies mean and deviation; a manifest that tells others changes no answer, other labels do."""
    broken = shutil.copytree(models, tmp_path / "models")
    path = broken / "digits" / "1" / "model.onnx"
    model = onnx.load(path)
    manifest = Artifact.load(path.parent).manifest
    (entry,) = [entry for entry in model.metadata_props if entry.key == MANIFEST_KEY]
    entry.value = manifest.model_copy(update={"labels": manifest.labels[:9]}).model_dump_json()
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match="expected one output `logits`"):
        Repository(broken, open_engine).load("digits", choose_device("cpu"))
