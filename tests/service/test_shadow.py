"""A shadow gets the same images; its answers are compared without noise, never given, and give way under load."""

import asyncio

import numpy as np
import pytest
from PIL import Image
from support import Engines, TinyModel, encode, random_pixels, running, spec_for, until

from service.config import Settings

PIXELS = random_pixels(12, seed=71)
FILES = [encode(Image.fromarray(one), "PNG") for one in PIXELS]
LABELS = TinyModel().labels


def observed(models, contents, engines=None, **options) -> tuple[list[dict], dict, str]:
    """Ask for all images, one after another; return answers, what /models/tiny says of the shadow, and metrics."""

    async def scenario():
        settings = Settings(models=models, **{"device": "cpu", "lanes": 1, "spot_check_share": 0.0, **options})
        async with running(settings, engines or Engines()) as client:
            service = client._transport.app.state.service
            shadow, answers = service.deployment().shadow, []
            for count, content in enumerate(contents, 1):
                answers.append((await client.post("/predict?logits=true", content=content)).json())
                await until(lambda count=count: shadow.comparison.outcomes.total() == count, "it was compared")
            metrics = service.metrics.exposition().decode()
            return answers, (await client.get("/models/tiny")).json()["shadow"], metrics

    return asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.fixture
def two_versions(tmp_path):
    """Versions 1, stable, and 2, its shadow, with other weights."""
    TinyModel(seed=1).write(tmp_path, 1)
    TinyModel(seed=2).write(tmp_path, 2)
    (tmp_path / "tiny" / "serving.json").write_text('{"stable": 1, "shadow": 2}')
    return tmp_path


def test_flips_and_the_largest_difference_of_each_class_are_those_of_the_two_models(two_versions):
    answers, shadow, metrics = observed(two_versions, FILES)

    ours, theirs = (TinyModel(seed=seed).logits(PIXELS) for seed in (1, 2))
    flipped = ours.argmax(axis=1) != theirs.argmax(axis=1)
    assert {answer["version"] for answer in answers} == {1}, "the shadow never answers"
    assert shadow["version"] == 2
    assert shadow["images"].get("flipped", 0) == flipped.sum() > 0
    assert shadow["images"].get("same label", 0) == (~flipped).sum()
    assert sum(flip["count"] for flip in shadow["flips"]) == flipped.sum()
    for flip in shadow["flips"]:
        pair = (LABELS.index(flip["stable"]), LABELS.index(flip["shadow"]))
        assert flip["count"] == sum((ours.argmax(axis=1) == pair[0]) & (theirs.argmax(axis=1) == pair[1]))
    largest = np.abs(ours - theirs).max(axis=0)
    assert [shadow["largest_difference"][label] for label in LABELS] == pytest.approx(largest, abs=1e-3)
    wanted = f'foldserve_shadow_images_total{{model="tiny",outcome="flipped",shadow="2",version="1"}} {flipped.sum()}.0'
    assert wanted in metrics


def test_two_files_of_one_function_differ_in_no_bit_whatever_the_load(tmp_path):
    """The comparison has no noise: crowds beside lone runs, two sessions, and still every answer has equal bits."""
    for version in (1, 2):
        TinyModel(seed=1).write(tmp_path, version)
    (tmp_path / "tiny" / "serving.json").write_text('{"stable": 1, "shadow": 2}')

    async def scenario():
        settings = Settings(models=tmp_path, device="cpu", lanes=2, share_identical=False, spot_check_share=0.0)
        async with running(settings, Engines()) as client:
            service = client._transport.app.state.service
            shadow = service.deployment().shadow
            for size in (1, 5, 12, 3, 12):
                files = [("file", (f"{index}.png", content)) for index, content in enumerate(FILES[:size])]
                before = shadow.comparison.outcomes.total()
                await client.post("/predict", files=files)
                await until(lambda done=before + size: shadow.comparison.outcomes.total() == done, "compared or let go")
            return shadow.comparison

    comparison = asyncio.run(asyncio.wait_for(scenario(), 60))

    assert set(comparison.outcomes) <= {"same bits", "dropped"}
    assert comparison.outcomes["same bits"] >= 1
    assert set(comparison.differences.values()) == {0.0}


def test_a_shadow_that_wants_other_pixels_decodes_them_itself(tmp_path):
    TinyModel(seed=1).write(tmp_path, 1)
    gray = GrayModel(seed=2)
    gray.write(tmp_path, 2)
    (tmp_path / "tiny" / "serving.json").write_text('{"stable": 1, "shadow": 2}')

    _, shadow, _ = observed(tmp_path, FILES[:4])

    assert sum(shadow["images"].values()) == 4
    assert "failed" not in shadow["images"]
    ours = TinyModel(seed=1).logits(PIXELS[:4])
    grays = np.stack([np.asarray(Image.fromarray(one).convert("L"))[..., np.newaxis] for one in PIXELS[:4]])
    largest = np.abs(ours - gray.logits(grays)).max(axis=0)
    assert [shadow["largest_difference"][label] for label in LABELS] == pytest.approx(largest, abs=1e-3)


class GrayModel(TinyModel):
    def __init__(self, seed: int) -> None:
        super().__init__(mode="L", seed=seed)

    @property
    def spec(self):
        return spec_for("L")


class SecondFails(Engines):
    """The second engine that is opened, the shadow's, fails once it has loaded."""

    def __call__(self, model_bytes, device):
        engine = super().__call__(model_bytes, device)
        if len(self.opened) == 2:
            self.fail = lambda: setattr(engine, "twist", lambda _, logits: logits * float("nan"))
        return engine


def test_a_shadow_that_fails_is_counted_and_hurts_nobody(two_versions):
    engines = SecondFails()

    async def scenario():
        settings = Settings(models=two_versions, device="cpu", lanes=1, spot_check_share=0.0)
        async with running(settings, engines) as client:
            engines.fail()
            shadow = client._transport.app.state.service.deployment().shadow
            response = await client.post("/predict", content=FILES[0])
            await until(lambda: shadow.comparison.outcomes.total() == 1, "it was tried")
            return response.status_code, dict(shadow.comparison.outcomes)

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == (200, {"failed": 1})


def test_under_load_the_shadow_gives_way(two_versions):
    engines = Engines()

    async def scenario():
        settings = Settings(models=two_versions, device="cpu", lanes=1, max_batch_size=1, spot_check_share=0.0)
        async with running(settings, engines) as client:
            service = client._transport.app.state.service
            shadow, classifier = service.deployment().shadow, service.classifier()
            engine, other = engines.opened
            engine.close_gate()
            other.sizes.clear()
            asked = [asyncio.create_task(client.post("/predict", content=content)) for content in FILES]
            await until(lambda: classifier._batcher.depth == len(FILES) - 1, "a crowd waits")
            engine.gate.set()
            await asyncio.gather(*asked)
            await until(lambda: shadow.comparison.outcomes.total() == len(FILES), "compared or let go")
            return shadow.comparison.outcomes, sum(other.sizes)

    outcomes, runs = asyncio.run(asyncio.wait_for(scenario(), 60))

    # The last three may be compared: with a run at hand the lane may have answered one more than the event loop knows.
    assert outcomes["dropped"] >= len(FILES) - 3
    assert runs == outcomes.total() - outcomes["dropped"]
