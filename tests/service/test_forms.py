"""Two forms of one version: which one is served, what is refused, and what a degraded exact model does."""

import asyncio
import logging
import threading

import numpy as np
import pytest
from exact_recipes import make
from exact_service import RECIPE, Kernels, golden_of, kind_of, write_exact
from exact_support import bits
from support import CPU, TinyModel, until

from service.app import create_app
from service.certification import certify_model
from service.config import Settings
from service.engine import open_engine
from service.errors import ArtifactError, NotCertified
from service.golden import Golden
from service.repository import TIMED_IMAGES, Repository
from service.running import Job, Runner

GRAPH = make(RECIPE)
SLOW_S = 0.02


class Slow:
    """Opens real engines, of which those of some kinds take their time."""

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds

    def __call__(self, model_bytes, device):
        engine, waits = open_engine(model_bytes, device), kind_of(model_bytes) in self.kinds
        run = engine.run

        def slow(images, threads=1):
            threading.Event().wait(SLOW_S if waits else 0)
            return run(images, threads)

        engine.run = slow
        return engine


@pytest.fixture
def models(tmp_path):
    write_exact(tmp_path / "models", GRAPH)
    return tmp_path / "models"


@pytest.mark.parametrize(
    "slow, form", [(("twin",), "exact"), (("integer", "unsigned"), "float")], ids=["float is slow", "exact is slow"]
)
def test_auto_serves_the_form_that_runs_faster_here_and_says_so(models, caplog, slow, form):
    caplog.set_level(logging.INFO)
    model = Repository(models, Slow(*slow), "auto").load("exact", CPU)

    assert model.form == form
    assert f"serving the {form} form" in caplog.text
    assert "ms an image" in caplog.text


def test_auto_compares_the_forms_on_one_batch(models):
    sizes = set()

    def spoils(kind, images, threads):
        sizes.add((kind, len(images), threads))
        return False

    Repository(models, Kernels(spoils), "auto").load("exact", CPU)

    assert {("integer", TIMED_IMAGES, 1), ("twin", TIMED_IMAGES, 1)} <= sizes


@pytest.mark.parametrize("form", ["exact", "float"])
def test_a_form_that_is_asked_for_is_served_whatever_it_costs(models, form):
    model = Repository(models, Slow("integer" if form == "exact" else "twin"), form).load("exact", CPU)

    assert (model.form, model.artifact.path.name) == (form, {"exact": "exact.onnx", "float": "model.onnx"}[form])


def test_the_two_forms_have_digests_of_their_own_files(models):
    exact, plain = (Repository(models, open_engine, form).load("exact", CPU) for form in ("exact", "float"))

    assert exact.digest != plain.digest
    assert bits(exact.run(GRAPH.images)) == bits(GRAPH.values["logits"])


def test_a_model_without_an_exact_form_is_served_as_floats_and_exact_refused(tmp_path):
    TinyModel().write(tmp_path)

    assert Repository(tmp_path, open_engine, "auto").load("tiny", CPU).form == "float"
    with pytest.raises(ArtifactError, match=r"tiny/1 has no exact form; export the model again, or .* --form float"):
        Repository(tmp_path, open_engine, "exact").load("tiny", CPU)


def with_golden(folder, golden: Golden) -> None:
    (folder / "exact" / "1" / "golden.npz").write_bytes(golden.to_bytes())


def other_bit() -> np.ndarray:
    logits = GRAPH.values["logits"].copy()
    logits[3, 1] = np.nextafter(logits[3, 1], np.float32(np.inf))
    return logits


@pytest.mark.parametrize("form", ["exact", "auto"])
def test_a_golden_answer_of_one_other_bit_is_refused(models, form):
    golden = golden_of(GRAPH)
    with_golden(models, Golden(golden.encoded, golden.pixels, golden.logits_float64, golden.tolerance, other_bit()))

    with pytest.raises(ArtifactError, match=r"exact.onnx: golden image 3: the exact form gives other bits than its"):
        Repository(models, open_engine, form).load("exact", CPU)
    assert Repository(models, open_engine, "float").load("exact", CPU).form == "float", "within its tolerance"


def test_an_exact_form_without_exact_golden_answers_is_refused(models):
    golden = golden_of(GRAPH)
    with_golden(models, Golden(golden.encoded, golden.pixels, golden.logits_float64, golden.tolerance))

    with pytest.raises(ArtifactError, match=r"golden.npz has no answers of the exact form; export the model again"):
        Repository(models, open_engine, "exact").load("exact", CPU)


def test_kernels_that_fail_the_golden_images_give_way_to_the_next_execution(models, caplog):
    kernels = Kernels(lambda kind, *_: kind in {"integer", "unsigned"})
    model = Repository(models, kernels, "exact").load("exact", CPU)

    assert model.engine.execution == "twin"
    assert "going on with the execution twin" in caplog.text


def test_a_file_that_breaks_its_bound_is_refused_with_path_and_node(tmp_path):
    graph = make(RECIPE)
    bias = next(node for node in graph.nodes if node.op_type == "QLinearConv").input[8]
    graph.constants[bias] = graph.constants[bias] + np.int32(2**24)
    write_exact(tmp_path, graph)

    with pytest.raises(ArtifactError, match=r"exact.onnx: node node/qlinearconv\d+: output channel \d can reach"):
        Repository(tmp_path, open_engine, "exact").load("exact", CPU)


def certified(models, kernels):
    model = Repository(models, kernels, "exact").load("exact", CPU)
    settings = Settings(models=models, state=models.parent / "state", max_batch_size=4)
    return model, certify_model(model, CPU, settings, lambda *_: None, {})


def test_a_degraded_exact_model_goes_on_with_another_execution_and_the_same_bits(models, caplog):
    model, certificate = certified(models, Kernels())
    runner = Runner(model, certificate)
    first, before = model.engine.execution, runner.run([Job(one) for one in GRAPH.images])

    runner.degrade()
    after = runner.run([Job(one) for one in GRAPH.images])

    assert model.engine.execution != first
    assert f"goes on with the execution {model.engine.execution}" in caplog.text
    assert bits(np.stack(before)) == bits(np.stack(after)) == bits(GRAPH.values["logits"])


def test_degrading_again_and_again_ends_with_the_twin(models):
    model, certificate = certified(models, Kernels())
    runner = Runner(model, certificate)
    for _ in range(5):
        runner.degrade()

    assert (model.engine.execution, runner.is_degraded) == ("twin", True)
    assert bits(runner.replay(GRAPH.images[0])[np.newaxis]) == bits(GRAPH.values["logits"][:1])


def is_golden(images: np.ndarray) -> bool:
    return any(np.array_equal(images[0], one) for one in GRAPH.images)


def test_a_service_is_not_ready_where_no_execution_keeps_the_integers(models, tmp_path):
    failures: list[BaseException] = []
    settings = Settings(models=models, device="cpu", form="exact", state=tmp_path / "state", max_batch_size=2)
    kernels = Kernels(lambda _, images, __: not is_golden(images))
    app = create_app(settings, open_engine=kernels, on_failure=failures.append)

    async def start() -> bool:
        async with app.router.lifespan_context(app):
            await until(lambda: app.state.service.status != "loading", "it fails")
            return app.state.service.is_ready

    assert asyncio.run(start()) is False
    (failure,) = failures
    assert isinstance(failure, NotCertified)
    assert "no shape gives the bits of the integers" in str(failure)
