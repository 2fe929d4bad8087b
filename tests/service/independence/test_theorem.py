"""Certificates of exact models: by theorem, comparable between machines, and only where kernels do sum products."""

from dataclasses import replace

import numpy as np
import pytest
from exact_service import Kernels, TransformingEngine, artifact_of, wide_sums, write_exact
from exact_support import bits
from independence_support import BRIEF, SHAPES, tiny_subject
from support import CPU, random_pixels

from service.certification import certify_model
from service.config import Settings
from service.engine import Shape
from service.errors import NotCertified, NotExact
from service.independence.certificate import CertificateStore
from service.independence.certify import Subject, certify
from service.independence.exactness import THEOREM_VERSION, reference_logits
from service.independence.report import table
from service.independence.theorem import FEWEST, hold_against_integers, theorem_of
from service.integers import read_steps
from service.repository import Model, Repository

GRAPH = wide_sums()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return artifact_of(GRAPH, tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same function in another file."""
    graph = wide_sums()
    graph.nodes[0].name = "renamed"
    return artifact_of(graph, tmp_path_factory.mktemp("other"))


def certified(artifact, transforms=lambda size, threads: False, machine="one", store=None):
    engine = TransformingEngine(GRAPH, transforms, machine)
    return certify(Subject("exact", 1, artifact, engine, SHAPES), store or CertificateStore(None), effort=BRIEF)


def served(certificate) -> set[Shape]:
    return {record.shape for record in certificate.shapes}


def test_the_certificate_says_by_theorem_and_names_premise_layer_and_headroom(artifact):
    certificate = certified(artifact)
    theorem = certificate.theorem

    assert (certificate.verdict, certificate.form) == ("certified", "exact")
    assert certificate.reason.startswith("by theorem")
    assert theorem.statement.startswith("by theorem")
    assert "sum products" in theorem.premise
    assert (theorem.version, theorem.layers, theorem.execution) == (THEOREM_VERSION, 2, "integer")
    assert theorem.tightest_layer == "node/qlinearconv9"
    assert 0 < theorem.headroom_bits < 1
    assert theorem.images >= FEWEST
    assert served(certificate) == set(SHAPES)
    assert "by theorem" in table(certificate)


def test_the_certificate_of_a_float_model_names_no_theorem():
    certificate = certify(tiny_subject(), CertificateStore(None), effort=BRIEF)

    assert certificate.theorem is None
    assert "theorem" not in certificate.reason


def test_answers_are_comparable_between_machines_and_not_between_files(artifact, other):
    one, two, elsewhere = certified(artifact), certified(artifact, machine="two"), certified(other)

    assert one.fingerprint != two.fingerprint
    assert one.digest != two.digest
    assert one.answer_digest == two.answer_digest
    assert elsewhere.answer_digest != one.answer_digest


def test_answers_stay_comparable_where_fewer_shapes_are_sound(artifact):
    assert certified(artifact, lambda size, _: size == 4).answer_digest == certified(artifact).answer_digest


def test_a_transform_is_no_sum_of_products_and_gives_other_bits():
    steps = theorem_of_graph()
    images = random_pixels(8, side=20)
    engine = TransformingEngine(GRAPH, lambda *_: True)
    wanted = reference_logits(steps, images)

    assert bits(engine.run(images)) != bits(wanted)
    assert np.abs(engine.run(images) - wanted).max() < 0.01 * np.abs(wanted).max(), "near, which is all the worse"
    assert bits(engine.run(images[:3])) == bits(engine.run(images)[:3]), "it does not even mix images"


def theorem_of_graph():
    return read_steps(GRAPH.model())


@pytest.mark.parametrize(
    "transforms, lost",
    [
        (lambda size, _: size == 4, {Shape(4, 1)}),
        (lambda _, threads: threads == 4, {Shape(1, 4)}),
        (lambda size, _: size > 1, {Shape(2, 1), Shape(4, 1)}),
    ],
    ids=["one size", "several threads", "batches"],
)
def test_a_shape_whose_kernels_transform_is_never_run(artifact, transforms, lost):
    certificate = certified(artifact, transforms)

    assert certificate.verdict == "certified"
    assert served(certificate) == set(SHAPES) - lost
    dropped = {record.shape.shape: record.reason for record in certificate.probe.dropped}
    assert set(dropped) == lost
    assert all(reason.startswith("its kernels do not sum products") for reason in dropped.values())


def test_kernels_that_transform_at_every_shape_are_refused_although_they_agree_with_themselves(artifact, tmp_path):
    certificate = certified(artifact, lambda *_: True, store=CertificateStore(tmp_path))

    assert (certificate.verdict, certificate.shapes, certificate.theorem) == ("refused", (), None)
    assert "this runtime's kernels do not sum products here" in certificate.reason
    assert len(certificate.probe.classes) == 1, "a float model would have been certified"
    assert list(tmp_path.rglob("*.json")) == []


def test_integers_are_compared_on_images_of_every_kind(artifact):
    theorem = theorem_of(artifact)
    seen = []

    def run(images, threads):
        seen.append(images)
        return reference_logits(theorem.steps, images)

    wrong, count = hold_against_integers(theorem, run, [Shape(4, 1)], artifact.golden.pixels, lambda *_: None)

    assert wrong == {}
    assert count >= FEWEST
    assert len(np.unique(np.concatenate(seen), axis=0)) >= count // 2
    assert any((image == image.flat[0]).all() for image in np.concatenate(seen)), "a flat field"


def test_a_single_wrong_bit_in_a_single_image_is_found(artifact):
    theorem = theorem_of(artifact)

    def run(images, threads):
        logits = reference_logits(theorem.steps, images)
        if (images[0] == images[0].flat[0]).all():  # flat fields alone
            logits[0, -1] = np.nextafter(logits[0, -1], np.float32(np.inf))
        return logits

    wrong, _ = hold_against_integers(theorem, run, [Shape(1, 1)], artifact.golden.pixels, lambda *_: None)
    assert set(wrong) == {Shape(1, 1)}


def test_a_kept_certificate_is_checked_and_kernels_that_changed_since_are_refused(artifact, tmp_path):
    store = CertificateStore(tmp_path)
    first = certified(artifact, store=store)

    assert certified(artifact, store=store).digest == first.digest
    with pytest.raises(NotCertified, match="has a certificate for this machine"):
        certified(artifact, lambda *_: True, store=store)


def test_a_file_that_claims_exactness_and_breaks_the_bound_is_refused(artifact):
    graph = wide_sums()
    name = next(node for node in graph.nodes if node.op_type == "QLinearConv").input[8]
    graph.constants[name] = np.full(16, 2**24, np.int32)
    broken = replace(artifact, _kept=[graph.model().SerializeToString()])

    with pytest.raises(NotExact, match=r"node node/qlinearconv\d+: output channel \d+ can reach"):
        theorem_of(broken)
    assert theorem_of(replace(broken, form="float")) is None, "a float form claims nothing"


@pytest.fixture
def models(tmp_path):
    write_exact(tmp_path / "models", GRAPH)
    return tmp_path / "models"


def certify_with(models, kernels) -> tuple[Model, object]:
    model = Repository(models, kernels, "exact").load("exact", CPU)
    settings = Settings(models=models, state=models.parent / "state", max_batch_size=2)
    return model, certify_model(model, CPU, settings, lambda *_: None, {})


def is_golden(images: np.ndarray) -> bool:
    return any(np.array_equal(images[0], one) for one in GRAPH.images)


def test_an_execution_that_keeps_the_integers_at_no_shape_gives_way_to_the_next(models):
    kernels = Kernels(lambda kind, images, _: kind in {"integer", "unsigned"} and not is_golden(images))
    model, certificate = certify_with(models, kernels)

    assert certificate.verdict == "certified"
    assert certificate.theorem.execution == model.engine.execution == "twin"
    assert bits(model.run(GRAPH.images)) == bits(GRAPH.values["logits"])


def test_where_no_execution_keeps_the_integers_the_model_is_refused(models):
    model, certificate = certify_with(models, Kernels(lambda _, images, __: not is_golden(images)))

    assert certificate.verdict == "refused"
    assert "do not sum products" in certificate.reason
    assert model.engine.execution == "twin", "the last one was tried"
