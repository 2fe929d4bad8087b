"""Makes certificates: proof, then probe, then the choice of what may run.

A certificate that is kept from before is trusted only after the proof was made again and a quick probe on this very
process agreed with it; where it disagrees the model is refused, for then the machine is not what it says it is.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

import numpy as np
import onnx
from numpy.typing import NDArray

from service.artifact import Artifact
from service.engine import Engine, Shape
from service.errors import NotCertified
from service.independence.certificate import (
    Certificate,
    CertificateStore,
    DroppedRecord,
    Measured,
    ProbeRecord,
    ProofRecord,
    ShapeRecord,
    TheoremRecord,
    cost_records,
)
from service.independence.effort import FULL, QUICK, Effort
from service.independence.exactness import THEOREM_VERSION
from service.independence.fingerprint import digest_of_json, fingerprint
from service.independence.probe import Findings, Report, Run, digest_of, fill, probe
from service.independence.probe_images import probe_images
from service.independence.proof import Verdict, prove
from service.independence.theorem import PREMISE, STATEMENT, Theorem, hold_against_integers, theorem_of
from service.independence.timing import Cost, costs_of
from service.wording import counted

SENTINELS = QUICK.images


@dataclass(frozen=True, slots=True)
class Subject:
    """What is certified: an artifact, under its name, on an engine, with the shapes that might run."""

    name: str
    version: int
    artifact: Artifact
    engine: Engine
    candidates: tuple[Shape, ...]
    excluded: dict[Shape, str] = field(default_factory=dict)  # never even tried, and why
    lanes: int = 1  # how many runs of one thread the machine does at once


def candidates(cores: int, device: str, max_batch_size: int) -> tuple[Shape, ...]:
    """Return the shapes worth trying: powers of two and the largest batch on one thread, and one image on all cores.

    An image alone may have every core; a crowd shares them, one lane each.
    """
    sizes = sorted(
        {2**power for power in range(max_batch_size.bit_length()) if 2**power <= max_batch_size} | {max_batch_size}
    )
    lone = [Shape(1, cores)] if device == "cpu" and cores > 1 else []
    return (*(Shape(size, 1) for size in sizes), *lone)


def subject_of(
    name: str, version: int, artifact: Artifact, engine: Engine, shapes: tuple[Shape, ...], lanes: int = 1
) -> Subject:
    """Leave out what is known to fail: one image on several threads, where a convolution keeps the plain layout.

    ONNX Runtime cuts a lone image's plain convolution into slices by threads, and its sums with it.
    """
    plain = engine.plain_convolutions()
    reason = f"the plain convolution {plain[0]} sums a lone image by threads" if plain else ""
    excluded = {shape: reason for shape in shapes if plain and shape.batch_size == 1 and shape.threads > 1}
    kept = tuple(shape for shape in shapes if shape not in excluded)
    return Subject(name, version, artifact, engine, kept, excluded, lanes)


def certify(
    subject: Subject,
    store: CertificateStore,
    *,
    fresh: bool = False,
    effort: Effort = FULL,
    report: Report = lambda *_: None,
    made_beside: Mapping[str, Certificate] = MappingProxyType({}),
) -> Certificate:
    """Return the certificate of a model on this device, a kept one where it still holds; `fresh` ignores kept ones.

    One of `made_beside`, by fingerprint digest, is taken as it is: made a moment ago on this machine, by a process
    with this one's fingerprint. A refusal is a certificate too.
    Raises NotCertified when a kept certificate and this process disagree.
    """
    started = time.perf_counter()
    facts = _fingerprint(subject)
    if (taken_over := made_beside.get(digest_of_json(facts))) is not None:
        return taken_over
    verdict = prove(onnx.load_model_from_string(subject.artifact.model_bytes))
    if verdict.verdict != "independent":
        return _refused(subject, facts, verdict, started)
    kept = None if fresh else store.find(facts)
    if kept is not None:
        checked = _checked(subject, kept, report)
        return _timed_again(subject, checked, store, report)
    real = subject.artifact.golden.pixels
    findings = probe(subject.engine.run, subject.candidates, real, effort, report, lanes=subject.lanes)
    theorem = theorem_of(subject.artifact)
    held = 0
    if theorem is not None:
        wrong, held = hold_against_integers(theorem, subject.engine.run, subject.candidates, real, report)
        findings.unsound.update(wrong)
    certificate = _conclude(subject, facts, verdict, findings, started, _by_theorem(subject, theorem, held))
    if certificate.verdict == "certified":
        store.save(certificate)
    return certificate


def best_class(findings: Findings) -> tuple[Shape, ...]:
    """Return the class of shapes that answers the most images per second of a core, or none."""

    def rate(group: Sequence[Shape]) -> tuple[float, int]:
        best = max(shape.batch_size / (findings.costs_s[shape] * shape.threads) for shape in group)
        return best, len(group)

    sound = [tuple(shape for shape in group if shape not in findings.unsound) for group in findings.classes]
    return max((group for group in sound if group), key=rate, default=())


def _checked(subject: Subject, kept: Certificate, report: Report) -> Certificate:
    """Return a kept certificate that a quick probe agrees with. Raises NotCertified where it does not."""
    shapes = tuple(record.shape for record in kept.shapes)
    report("checking the kept certificate", 0.0)
    known = {cost.shape.shape: cost.seconds for cost in kept.measured.costs}
    costs = {shape: known[shape] for shape in shapes}
    findings = probe(subject.engine.run, shapes, subject.artifact.golden.pixels, QUICK, report, costs, subject.lanes)
    problem = None
    if findings.unsound:
        shape, reason = next(iter(findings.unsound.items()))
        problem = f"at batch {shape.batch_size} on {counted(shape.threads, 'thread')} {reason}"
    elif len(findings.classes) != 1:
        problem = "its shapes no longer have the same bits"
    elif _sentinel_of(subject, shapes[0], findings) != kept.sentinel_digest:
        problem = "the reference answers have other bits"
    if problem is not None:
        raise NotCertified(
            f"model {subject.name} version {subject.version} has a certificate for this machine, but {problem}; "
            f"find out what changed, then run: foldserve certify {subject.name} --fresh"
        )
    return kept


def _timed_again(subject: Subject, kept: Certificate, store: CertificateStore, report: Report) -> Certificate:
    """Return the certificate with the costs that were doubtful measured again, and keep it: its digest is the same.

    Else what was measured while the machine was busy would decide for ever how the model runs.
    """
    before = {cost.shape.shape: Cost(cost.seconds, cost.is_calm) for cost in kept.measured.costs}
    served = {record.shape for record in kept.shapes}
    doubtful = [shape for shape, cost in before.items() if shape in served and not cost.is_calm]
    if not doubtful:
        return kept
    report("measuring again what was measured on a busy machine", 0.0)
    timed = costs_of(subject.engine.run, doubtful, subject.artifact.golden.pixels, is_again=True)
    better = before | {shape: cost.better(before[shape]) for shape, cost in timed.items()}
    measured = kept.measured.model_copy(update={"costs": cost_records(better)})
    renewed = kept.model_copy(update={"measured": measured})
    store.save(renewed)
    return renewed


def _by_theorem(subject: Subject, theorem: Theorem | None, held: int) -> dict[str, object]:
    """Return what the certificate of an exact model says beside that of a float one."""
    if theorem is None:
        return {}
    tightest = theorem.exactness.tightest
    record = TheoremRecord(
        version=THEOREM_VERSION,
        statement=STATEMENT,
        premise=PREMISE,
        layers=len(theorem.exactness.layers),
        tightest_layer=tightest.name,
        headroom_bits=round(tightest.headroom_bits, 2),
        execution=str(subject.engine.describe().get("execution", "integer")),
        images=held,
    )
    return {
        "theorem": record,
        "reason": "by theorem: every sum is an integer of at most 24 bits, which no kernel that sums can round",
        "answer_digest": theorem.answer_digest,
    }


def _conclude(
    subject: Subject,
    facts: dict[str, object],
    verdict: Verdict,
    findings: Findings,
    started: float,
    by_theorem: dict[str, object],
) -> Certificate:
    shapes = best_class(findings)
    record = _probe_record(findings, shapes, subject.excluded)
    measured = _measured(findings, time.perf_counter() - started)
    common = _common(subject, facts, verdict) | {"probe": record, "measured": measured}
    if not shapes:
        reason = "no way of running it gives an image the same bits each time"
        if by_theorem:
            reason = "no shape gives the bits of the integers: this runtime's kernels do not sum products here"
        return Certificate(verdict="refused", reason=reason, **common)
    sentinel = _sentinel_of(subject, shapes[0], findings)
    said = {
        "reason": "no operator mixes images, and every shape that may run gives the same bits",
        "answer_digest": digest_of_json({"fingerprint": facts, "sentinel": sentinel}),
    }
    return Certificate(
        verdict="certified",
        reference=ShapeRecord.of(shapes[0]),
        shapes=tuple(ShapeRecord.of(shape) for shape in shapes),
        reference_digest=findings.digests[shapes[0]],
        sentinel_digest=sentinel,
        **(common | said | by_theorem),
    )


def _refused(subject: Subject, facts: dict[str, object], verdict: Verdict, started: float) -> Certificate:
    where = f"{verdict.verdict} at node {verdict.node}: {verdict.reason}. {verdict.remedy}"
    measured = Measured(created=_now(), seconds=time.perf_counter() - started, comparisons=0, costs=())
    common = _common(subject, facts, verdict) | {"measured": measured}
    return Certificate(verdict="refused", reason=where, **common)


def _common(subject: Subject, facts: dict[str, object], verdict: Verdict) -> dict[str, object]:
    return {
        "model": subject.name,
        "version": subject.version,
        "model_digest": subject.artifact.digest,
        "form": subject.artifact.form,
        "fingerprint": facts,
        "proof": ProofRecord(
            verdict=verdict.verdict,
            node=verdict.node,
            operator=verdict.operator,
            reason=verdict.reason,
            remedy=verdict.remedy,
            nodes=verdict.nodes_seen,
        ),
    }


def _probe_record(findings: Findings, chosen: tuple[Shape, ...], excluded: dict[Shape, str]) -> ProbeRecord:
    dropped = {**excluded, **findings.unsound}
    for group in findings.classes:
        for shape in group:
            if shape not in chosen and shape not in dropped:
                dropped[shape] = "its bits differ from those of the shapes that are served"
    return ProbeRecord(
        images=findings.images,
        classes=tuple(tuple(ShapeRecord.of(shape) for shape in group) for group in findings.classes),
        dropped=tuple(
            DroppedRecord(shape=ShapeRecord.of(shape), reason=reason) for shape, reason in sorted(dropped.items())
        ),
        cut=findings.cut,
    )


def _measured(findings: Findings, seconds: float) -> Measured:
    costs = {shape: Cost(cost, shape not in findings.doubtful) for shape, cost in findings.costs_s.items()}
    records, comparisons = cost_records(costs), findings.comparisons
    return Measured(created=_now(), seconds=round(seconds, 3), comparisons=comparisons, costs=records)


def _sentinel_of(subject: Subject, reference: Shape, findings: Findings) -> str:
    if findings.images == SENTINELS:  # the probe's images are the sentinels, and it ran them
        return findings.digests[reference]
    return _sentinel_digest(subject, reference)


def _sentinel_digest(subject: Subject, reference: Shape) -> str:
    real = subject.artifact.golden.pixels
    images = probe_images(SENTINELS, real.shape[1:], real)
    return digest_of(_alone(subject.engine.run, images, reference))


def _alone(run: Run, images: NDArray[np.uint8], reference: Shape) -> NDArray[np.float32]:
    """Return the logits of each image by itself at the reference shape."""
    runs = [run(fill(image[np.newaxis], reference.batch_size), reference.threads)[:1] for image in images]
    return np.concatenate(runs)


def _fingerprint(subject: Subject) -> dict[str, object]:
    candidates = [[shape.batch_size, shape.threads] for shape in subject.candidates]
    return fingerprint(subject.artifact.digest, subject.artifact.form, subject.engine.describe(), candidates)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
