"""When a model is certified, what it may run in, and when a certificate that was kept is trusted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from independence_support import BRIEF, SHAPES, FaultyEngine, flip, tiny_subject
from support import CPU, TinyModel

from service.engine import OnnxEngine, Shape
from service.errors import NotCertified
from service.independence.certificate import CertificateStore
from service.independence.certify import best_class, candidates, certify
from service.independence.effort import QUICK
from service.independence.probe import Findings


def always(images, threads, logits):
    return logits + np.float32(1)


FAULTS = {
    "a slot": lambda images, _, logits: flip(logits, len(images) - 1) if len(images) > 2 else logits,
    "threads": lambda _, threads, logits: flip(logits, 0) if threads == 4 else logits,
    "the size": lambda images, _, logits: flip(logits, 0) if len(images) == 1 else logits,
    "every answer": always,
}


def served(certificate) -> set[Shape]:
    return {record.shape for record in certificate.shapes}


@pytest.fixture
def store(tmp_path):
    return CertificateStore(tmp_path)


def test_a_sound_model_on_a_sound_engine_is_certified_and_kept(store, tmp_path):
    engine = OnnxEngine(TinyModel().model_bytes(), CPU)
    certificate = certify(tiny_subject(engine=engine), store)

    assert certificate.verdict == "certified"
    assert served(certificate) == set(SHAPES)
    assert certificate.reference.shape in SHAPES
    assert certificate.proof.verdict == "independent"
    assert store.find(certificate.fingerprint) == certificate
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_the_second_time_only_a_quick_probe_runs_and_the_certificate_is_the_same(store):
    engine = FaultyEngine()
    first = certify(tiny_subject(engine=engine), store)
    full, engine.shapes = len(engine.shapes), []
    second = certify(tiny_subject(engine=engine), store)

    assert second.digest == first.digest
    assert second.measured.created == first.measured.created
    assert len(engine.shapes) < full / 3
    assert {cost.shape for cost in second.measured.costs} == set(first.shapes)


def test_fresh_believes_no_kept_certificate(store):
    certify(tiny_subject(engine=FaultyEngine()), store, effort=BRIEF)

    again = certify(tiny_subject(engine=FaultyEngine(always)), store, fresh=True, effort=BRIEF)

    assert again.verdict == "certified"
    assert certify(tiny_subject(engine=FaultyEngine(always)), store).digest == again.digest


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_machine_that_is_no_longer_what_it_was_is_refused(store, fault):
    certify(tiny_subject(engine=FaultyEngine()), store, effort=BRIEF)

    with pytest.raises(NotCertified, match=r"has a certificate for this machine, but .*foldserve certify tiny --fresh"):
        certify(tiny_subject(engine=FaultyEngine(fault)), store, effort=BRIEF)


def test_a_kept_certificate_of_other_candidates_is_not_used(store):
    certify(tiny_subject(engine=FaultyEngine()), store, effort=BRIEF)

    fewer = certify(tiny_subject(SHAPES[:2], FaultyEngine()), store, effort=BRIEF)

    assert served(fewer) == set(SHAPES[:2])


def test_an_engine_that_never_repeats_itself_is_refused_and_not_kept(store, tmp_path):
    count = iter(range(10**9))
    engine = FaultyEngine(lambda images, _, logits: logits + np.float32(next(count) % 1000))

    certificate = certify(tiny_subject(engine=engine), store, effort=BRIEF)

    assert (certificate.verdict, certificate.shapes, certificate.reference) == ("refused", (), None)
    assert "same bits each time" in certificate.reason
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_every_candidate_is_served_or_dropped_with_a_reason(store):
    certificate = certify(tiny_subject(engine=FaultyEngine(FAULTS["a slot"])), store, effort=BRIEF)

    dropped = {record.shape.shape: record.reason for record in certificate.probe.dropped}
    assert served(certificate) | set(dropped) == set(SHAPES)
    assert not served(certificate) & set(dropped)
    assert all(dropped.values())


def test_an_interrupted_probe_leaves_nothing_behind(store, tmp_path):
    def stop(step, done):
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certify(tiny_subject(engine=FaultyEngine()), store, effort=BRIEF, report=stop)

    assert list(tmp_path.rglob("*")) == []


def test_two_machines_that_find_the_same_have_the_same_certificate():
    one, two = (certify(tiny_subject(engine=FaultyEngine()), CertificateStore(None), effort=BRIEF) for _ in range(2))

    assert (one.digest, one.answer_digest) == (two.digest, two.answer_digest)


def test_other_answers_are_not_called_comparable():
    one, two = (
        certify(tiny_subject(engine=FaultyEngine(fault)), CertificateStore(None), effort=BRIEF)
        for fault in (None, always)
    )

    assert one.answer_digest != two.answer_digest


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 100), st.booleans()), min_size=4, max_size=4))
def test_the_class_that_answers_most_images_per_second_of_a_core_is_served(rows):
    costs = {shape: row[1] / 1000 for shape, row in zip(SHAPES, rows, strict=True)}
    unsound = {shape: "x" for shape, row in zip(SHAPES, rows, strict=True) if row[2]}
    groups = {}
    for shape, row in zip(SHAPES, rows, strict=True):
        groups.setdefault(row[0], []).append(shape)
    classes = tuple(tuple(group) for group in groups.values())

    chosen = best_class(Findings(1, 1, classes, {}, unsound, costs, frozenset(), ()))

    sound = [shape for shape in SHAPES if shape not in unsound]
    assert not set(chosen) & set(unsound)
    assert bool(chosen) == bool(sound)
    if sound:
        rate = {shape: shape.batch_size / (costs[shape] * shape.threads) for shape in sound}
        assert max(rate[shape] for shape in chosen) == max(rate.values())
        assert any(set(chosen) == set(group) - set(unsound) for group in classes)


@given(st.integers(1, 16), st.integers(1, 300))
def test_candidates_hold_the_lone_image_the_largest_batch_and_nothing_larger(cores, largest):
    shapes = candidates(cores, "cpu", largest)

    assert {Shape(1, 1), Shape(largest, 1), Shape(1, cores)} <= set(shapes)
    assert max(shape.batch_size for shape in shapes) == largest
    assert len(set(shapes)) == len(shapes)
    assert {shape.threads for shape in shapes} <= {1, cores}
    assert all(shape.threads == 1 for shape in candidates(cores, "cuda", largest))


def test_a_quick_certificate_needs_no_store(tmp_path):
    certificate = certify(tiny_subject(engine=FaultyEngine()), CertificateStore(None), effort=QUICK)

    assert certificate.verdict == "certified"


def costs_kept(store, certificate) -> dict[Shape, tuple[float, bool]]:
    found = store.find(certificate.fingerprint)
    return {cost.shape.shape: (cost.seconds, cost.is_calm) for cost in found.measured.costs}


def with_costs(certificate, seconds: float, *, is_calm: bool):
    costs = tuple(
        cost.model_copy(update={"seconds": seconds, "is_calm": is_calm}) for cost in certificate.measured.costs
    )
    return certificate.model_copy(update={"measured": certificate.measured.model_copy(update={"costs": costs})})


def test_what_was_measured_on_a_busy_machine_is_measured_again_at_the_next_start_and_kept(store):
    first = certify(tiny_subject(engine=FaultyEngine()), store)
    store.save(with_costs(first, 3600.0, is_calm=False))

    second = certify(tiny_subject(engine=FaultyEngine()), store)

    assert all(cost.seconds < 3600 for cost in second.measured.costs)
    assert costs_kept(store, first) == {
        cost.shape.shape: (cost.seconds, cost.is_calm) for cost in second.measured.costs
    }
    assert second.digest == first.digest
    assert second.measured.created == first.measured.created


def test_what_was_measured_in_peace_is_believed(store):
    first = certify(tiny_subject(engine=FaultyEngine()), store)
    store.save(with_costs(first, 3600.0, is_calm=True))

    second = certify(tiny_subject(engine=FaultyEngine()), store)

    assert {cost.seconds for cost in second.measured.costs} == {3600.0}


def test_a_worse_time_never_replaces_a_better_one(store):
    first = certify(tiny_subject(engine=FaultyEngine()), store)
    store.save(with_costs(first, 1e-9, is_calm=False))

    second = certify(tiny_subject(engine=FaultyEngine()), store)

    assert {cost.seconds for cost in second.measured.costs} == {1e-9}
