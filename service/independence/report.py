"""A certificate as a person reads it."""

from collections.abc import Iterator

from service.independence.certificate import Certificate, ProbeRecord, ShapeRecord, TheoremRecord
from service.wording import counted


def table(certificate: Certificate) -> str:
    """Return the certificate as aligned lines."""
    rows = list(_rows(certificate))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in rows)


def _rows(certificate: Certificate) -> Iterator[tuple[str, str]]:
    yield "verdict", certificate.verdict.upper()
    yield "", certificate.reason
    yield "model", f"{certificate.model} version {certificate.version}, {certificate.form} form"
    yield "file", f"sha256 {certificate.model_digest}"
    proof = certificate.proof
    yield "operators", f"{proof.verdict}: {proof.reason}"
    if certificate.theorem is not None:
        yield from _theorem_rows(certificate.theorem)
    if certificate.probe is not None:
        yield from _probe_rows(certificate, certificate.probe)
    yield from _machine_rows(certificate)
    yield "certificate", certificate.digest
    if certificate.answer_digest is not None:
        yield "answers", f"{certificate.answer_digest} (services that show this digest answer with equal bits)"


def _theorem_rows(theorem: TheoremRecord) -> Iterator[tuple[str, str]]:
    yield (
        "sums",
        (
            f"{theorem.layers} layers, every partial sum below 2^24; tightest {theorem.tightest_layer}, "
            f"{theorem.headroom_bits:.1f} bits left"
        ),
    )
    yield "", f"premise: {theorem.premise} ({theorem.images} images)"
    yield "execution", theorem.execution


def _probe_rows(certificate: Certificate, probe: ProbeRecord) -> Iterator[tuple[str, str]]:
    yield "kernels", f"{probe.images} images, {certificate.measured.comparisons:,} answers compared as bits"
    costs = {cost.shape: cost.seconds for cost in certificate.measured.costs}
    for shape in certificate.shapes:
        mark = "  reference" if shape == certificate.reference else ""
        yield "", f"{_name(shape):28} equal bits  {1000 * costs[shape] / shape.batch_size:9.3f} ms an image{mark}"
    for dropped in probe.dropped:
        yield "", f"{_name(dropped.shape):28} never run: {dropped.reason}"
    for cut in probe.cut:
        yield "cut", cut
    yield "took", f"{certificate.measured.seconds:.1f} s, {certificate.measured.created}"


def _machine_rows(certificate: Certificate) -> Iterator[tuple[str, str]]:
    facts = certificate.fingerprint
    processor, engine = facts["processor"], facts["engine"]
    runtime = engine.get("runtime", {}).get("onnxruntime", "?")
    yield (
        "machine",
        f"{processor.get('model name', processor['machine'])}, {counted(facts['threads']['cores'], 'core')}",
    )
    yield "runtime", f"ONNX Runtime {runtime} on {engine.get('device', '?')}, Pillow {facts['decoders']['pillow']}"


def _name(shape: ShapeRecord) -> str:
    return f"{counted(shape.batch_size, 'image')} on {counted(shape.threads, 'thread')}"
