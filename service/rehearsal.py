"""`serve --dry-run`: the whole way without a socket. Load, certify, and answer the golden images through the queue."""

import time
from dataclasses import dataclass

import numpy as np

from service.app import create_app
from service.classifier import Answered, Classifier
from service.config import Settings
from service.inference import Service


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """How one version did: golden images whose logits are within the file's tolerance, of how many."""

    model: str
    version: int
    device: str
    certificate: str
    right: int
    images: int
    seconds: float

    @property
    def is_right(self) -> bool:
        """True when every golden image got its answer."""
        return self.right == self.images

    @property
    def line(self) -> str:
        """One line for a person."""
        return (
            f"{self.model} version {self.version} on {self.device}: {self.right} of {self.images} golden images right "
            f"in {self.seconds:.2f} s, certificate {self.certificate}"
        )


async def rehearse(settings: Settings) -> list[Rehearsal]:
    """Return how each version did that is served. Raises what `serve` would refuse at."""
    failures: list[BaseException] = []
    app = create_app(settings, on_failure=failures.append)
    service: Service = app.state.service
    try:
        await service.start()
        if failures:
            raise failures[0]
        served = [one for deployment in service.deployments() for one in deployment.classifiers()]
        return [await _ask(classifier, service) for classifier in served]
    finally:
        await service.stop()


async def _ask(classifier: Classifier, service: Service) -> Rehearsal:
    golden, model, certificate = classifier.model.artifact.golden, classifier.model, classifier.certificate
    started = time.monotonic()
    wanted, tolerance = golden.answers(classifier.model.form)
    right = 0
    for encoded, expected in zip(golden.encoded, wanted, strict=True):
        deadline = time.monotonic() + service.settings.request_timeout_s
        (outcome,) = await classifier.classify([encoded], deadline=deadline)
        right += isinstance(outcome, Answered) and bool(np.abs(outcome.logits - expected).max() <= tolerance)
    return Rehearsal(
        model=model.name,
        version=model.version,
        device=service.device.used if service.device else "?",
        certificate=certificate.digest[:12] if certificate and certificate.verdict == "certified" else "none",
        right=right,
        images=len(golden.encoded),
        seconds=time.monotonic() - started,
    )
