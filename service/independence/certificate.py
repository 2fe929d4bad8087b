"""The certificate: what was proved, what was probed, on which model, device and settings; and where it is kept.

Its digest covers the canonical JSON without what is only measured (times, durations, costs), so that two machines
that find the same have the same certificate.
"""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.engine import Shape
from service.independence.fingerprint import digest_of_json
from service.independence.timing import Cost
from service.manifest import Form

logger = logging.getLogger(__name__)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShapeRecord(_Record):
    """A way to run: images together, and threads."""

    batch_size: int
    threads: int

    @classmethod
    def of(cls, shape: Shape) -> "ShapeRecord":
        """Make the record of a shape."""
        return cls(batch_size=shape.batch_size, threads=shape.threads)

    @property
    def shape(self) -> Shape:
        """The shape again."""
        return Shape(self.batch_size, self.threads)


class ProofRecord(_Record):
    """What the static proof found: no operator mixes images, or which one may."""

    verdict: Literal["independent", "mixed", "unproven"]
    node: str
    operator: str
    reason: str
    remedy: str
    nodes: int


class DroppedRecord(_Record):
    """A shape that is never run, and why."""

    shape: ShapeRecord
    reason: str


class ProbeRecord(_Record):
    """What the probe tried and saw; `cut` says what was left out to stay in time."""

    images: int
    classes: tuple[tuple[ShapeRecord, ...], ...]
    dropped: tuple[DroppedRecord, ...]
    cut: tuple[str, ...]


class CostRecord(_Record):
    """The least time of a run of one shape, seconds; `is_calm`: it was measured without a neighbour's work."""

    shape: ShapeRecord
    seconds: float
    is_calm: bool = False  # of certificates from before it was noted, nobody knows


def cost_records(costs: Mapping[Shape, Cost]) -> tuple[CostRecord, ...]:
    """Return the records of costs, by shape."""
    return tuple(
        CostRecord(shape=ShapeRecord.of(shape), seconds=cost.seconds, is_calm=cost.is_calm)
        for shape, cost in sorted(costs.items())
    )


class TheoremRecord(_Record):
    """Why an exact model's bits are the same wherever sums are sums, and what was looked at of the premise."""

    version: int
    statement: str
    premise: str
    layers: int
    tightest_layer: str
    headroom_bits: float
    execution: str
    images: int = Field(description="images on which every shape gave the integers' bits")


class Measured(_Record):
    """What another run of the same probe would find different."""

    created: str
    seconds: float
    comparisons: int
    costs: tuple[CostRecord, ...]


class Certificate(_Record):
    """`certified`: only `shapes` ever run, and their bits are equal; `refused`: `reason` says why not."""

    schema_version: Literal[1] = 1
    verdict: Literal["certified", "refused"]
    reason: str
    model: str
    version: int
    model_digest: str
    form: Form
    proof: ProofRecord
    theorem: TheoremRecord | None = None
    probe: ProbeRecord | None = None
    reference: ShapeRecord | None = None
    shapes: tuple[ShapeRecord, ...] = ()
    reference_digest: str | None = None
    sentinel_digest: str | None = None
    fingerprint: dict[str, Any]
    answer_digest: str | None = None
    measured: Measured

    @property
    def digest(self) -> str:
        """The sha256 of all but what is only measured."""
        return digest_of_json(self.model_dump(mode="json", exclude={"measured"}))

    @property
    def fingerprint_digest(self) -> str:
        """The sha256 of the fingerprint: the name under which the certificate is kept."""
        return digest_of_json(self.fingerprint)


class _Stored(_Record):
    digest: str
    certificate: Certificate


class CertificateStore:
    """Certificates by fingerprint, in a state folder, for models/ may be read-only; without a folder, none is kept."""

    def __init__(self, state: Path | None) -> None:
        self._folder = None if state is None else state / "certificates"

    def find(self, fingerprint: dict[str, Any]) -> Certificate | None:
        """Return the certificate of this fingerprint. One that was edited, or is another's, is not believed."""
        path = self._path(digest_of_json(fingerprint))
        if path is None:
            return None
        try:
            stored = _Stored.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            logger.warning("certificate %s is not believed: it cannot be read (%s)", path, type(error).__name__)
            return None
        fault = _fault(stored, fingerprint)
        if fault is not None:
            logger.warning("certificate %s is not believed: it %s", path, fault)
        return stored.certificate if fault is None else None

    def save(self, certificate: Certificate) -> None:
        """Keep a certificate, whole or not at all. A disk that refuses costs the next start a full probe, no more."""
        path = self._path(certificate.fingerprint_digest)
        if path is None:
            return
        stored = _Stored(digest=certificate.digest, certificate=certificate).model_dump_json(indent=2)
        partial: Path | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8"
            ) as file:
                partial = Path(file.name)
                file.write(stored)
            partial.replace(path)
        except OSError as error:
            if partial is not None:
                partial.unlink(missing_ok=True)
            logger.warning("certificate %s could not be kept (%s); the next start measures again", path, error.strerror)

    def _path(self, fingerprint_digest: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{fingerprint_digest}.json"


def _fault(stored: _Stored, fingerprint: dict[str, Any]) -> str | None:
    certificate = stored.certificate
    if certificate.digest != stored.digest:
        return "was edited"
    if certificate.verdict != "certified" or not certificate.shapes:
        return "certifies nothing"
    if certificate.fingerprint != fingerprint:
        return "belongs to another machine, model or setting"
    return None
