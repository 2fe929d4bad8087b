"""Known-bad configurations on real sessions: a probe that did not fail on them would prove nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import pytest
from independence_support import (
    SHAPES,
    dynamically_quantized,
    facts_of,
    gemm_head,
    mean_head,
    subject,
    training_norm,
    wide_convolution,
)
from support import CPU, TinyModel, random_pixels

from service.engine import OnnxEngine, Shape
from service.errors import NotCertified
from service.independence.certificate import CertificateStore, ShapeRecord
from service.independence.certify import Subject, _sentinel_digest, certify, subject_of
from service.independence.effort import FULL, QUICK
from service.independence.probe import probe

LONE_ON_FOUR = Shape(1, 4)


@dataclass(frozen=True)
class Control:
    """A graph whose `bad` shapes give other bits than its others, and a like one where all agree."""

    breaks: Callable[[], onnx.ModelProto]
    holds: Callable[[], onnx.ModelProto]
    bad: tuple[Shape, ...]
    config: dict[str, str] = field(default_factory=dict)

    def subject(self) -> Subject:
        return subject(self.breaks(), SHAPES, **self.config)


def wide_258() -> onnx.ModelProto:
    return wide_convolution(258)


def wide_256() -> onnx.ModelProto:
    return wide_convolution(256)


def tiny() -> onnx.ModelProto:
    return TinyModel().onnx()


CROWDS = (Shape(2, 1), Shape(4, 1))
CONTROLS = {
    "prepacking disabled": Control(
        gemm_head, gemm_head, (Shape(1, 1), LONE_ON_FOUR), {"session__disable_prepacking": "1"}
    ),
    "plain convolution of 258 channels": Control(wide_258, wide_256, (LONE_ON_FOUR,)),
    "ReduceMean head of odd channels": Control(mean_head, tiny, CROWDS),
    "dynamic quantization": Control(dynamically_quantized, tiny, CROWDS),
    "BatchNorm in training mode": Control(training_norm, tiny, CROWDS),
}
each_control = pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)


@each_control
@pytest.mark.parametrize("effort", [FULL, QUICK], ids=["full", "quick"])
def test_the_probe_sees_it(control, effort):
    one = control.subject()

    found = probe(one.engine.run, SHAPES, one.artifact.golden.pixels, effort)

    good = set(SHAPES) - set(control.bad)
    mixed = [group for group in found.classes if good.intersection(group) and set(control.bad).intersection(group)]
    assert mixed == []
    assert len(found.classes) != 1 or found.unsound


@each_control
def test_it_is_refused_or_its_bad_shapes_are_never_served(control, tmp_path):
    certificate = certify(control.subject(), CertificateStore(tmp_path))

    served = {record.shape for record in certificate.shapes}
    good = set(SHAPES) - set(control.bad)
    assert not served & set(control.bad) or not served & good


@each_control
@pytest.mark.parametrize("is_sentinel_forged", [False, True], ids=["plain", "sentinel too"])
def test_behind_a_valid_certificate_start_up_refuses_it(control, is_sentinel_forged, tmp_path):
    store, bad = CertificateStore(tmp_path), control.subject()
    valid = certify(subject(control.holds(), SHAPES), CertificateStore(None))
    assert valid.verdict == "certified"
    assert {record.shape for record in valid.shapes} == set(SHAPES)
    sentinel = _sentinel_digest(bad, valid.shapes[0].shape) if is_sentinel_forged else valid.sentinel_digest
    store.save(valid.model_copy(update={"fingerprint": facts_of(bad), "sentinel_digest": sentinel}))
    assert store.find(facts_of(bad)) is not None, "the certificate is believed, so only the quick probe can object"

    try:
        verdict = certify(bad, store).verdict
    except NotCertified:
        verdict = "refused"

    assert verdict == "refused"


@pytest.mark.parametrize(
    ("graph", "node"), [(dynamically_quantized, "quantize"), (training_norm, "norm")], ids=["quantized", "BatchNorm"]
)
def test_a_mixing_operator_is_refused_by_name_before_anything_runs(graph, node, tmp_path):
    certificate = certify(subject(graph(), SHAPES), CertificateStore(tmp_path))

    assert (certificate.verdict, certificate.proof.verdict, certificate.proof.node) == ("refused", "mixed", node)
    assert node in certificate.reason
    assert certificate.probe is None
    assert list(tmp_path.rglob("*.json")) == []


def test_a_plain_convolution_is_named_and_its_lone_threaded_shape_left_out():
    artifact = subject(wide_258()).artifact
    engine = OnnxEngine(artifact.model_bytes, CPU)
    one = subject_of("wide", 1, artifact, engine, SHAPES)

    certificate = certify(one, CertificateStore(None))

    assert engine.plain_convolutions() == ("plain",)
    assert LONE_ON_FOUR not in one.candidates
    assert {record.shape for record in certificate.shapes} == set(SHAPES) - {LONE_ON_FOUR}
    dropped = {record.shape: record.reason for record in certificate.probe.dropped}
    assert list(dropped) == [ShapeRecord.of(LONE_ON_FOUR)]
    assert "plain" in dropped[ShapeRecord.of(LONE_ON_FOUR)]


def test_convolutions_in_the_blocked_layout_cost_no_shape():
    artifact = subject(wide_256()).artifact
    engine = OnnxEngine(artifact.model_bytes, CPU)

    assert engine.plain_convolutions() == ()
    assert subject_of("wide", 1, artifact, engine, SHAPES).candidates == SHAPES


def test_a_session_for_each_number_of_threads_and_no_more():
    engine = OnnxEngine(TinyModel().model_bytes(), CPU)
    for images, threads in ((1, 1), (4, 1), (1, 3), (2, 3), (8, 1)):
        engine.run(random_pixels(images), threads)

    counts = [one.get_session_options().intra_op_num_threads for one in engine._sessions.values()]
    assert sorted(counts) == [1, 3]


def test_an_engine_tells_its_config_and_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    usual, odd = (OnnxEngine(TinyModel().model_bytes(), CPU, config) for config in ({}, {"session.x": "1"}))

    assert odd.describe()["session"] == usual.describe()["session"] | {"session.x": "1"}
    assert list(Path(tmp_path).iterdir()) == []
