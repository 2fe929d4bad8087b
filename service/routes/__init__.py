"""The endpoints, grouped by audience. They parse, call and return; errors pass through to `service.app`."""

from typing import Annotated

from fastapi import Depends, Request
from starlette.types import Scope

from service.classifier import Classifier
from service.inference import Service

CERTIFICATE_HEADER = "Foldserve-Certificate"
NO_CERTIFICATE = "none"
ABOUT_A_MODEL = frozenset({"/predict", "/verify", "/models/{name}"})  # whose answers name it, errors included


def certificate_of(classifier: Classifier) -> str:
    """Return the digest of the certificate that an answer is given under, or `none`."""
    certificate = classifier.certificate
    return certificate.digest if certificate is not None and certificate.verdict == "certified" else NO_CERTIFICATE


def choose_classifier(request: Request, service: Service, name: str | None, version: int | None = None) -> Classifier:
    """Return `service.classifier(name, version)`, whose certificate the answer will name. Raises as that does."""
    classifier = service.classifier(name, version)
    request.state.classifier = classifier
    return classifier


def certificate_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Return the header that names the certificate, for an answer about a model; `none` where no model was found."""
    path = getattr(scope.get("route"), "path", "")
    if path not in ABOUT_A_MODEL and not path.startswith("/v2/models/"):
        return []
    classifier = scope.get("state", {}).get("classifier")
    digest = certificate_of(classifier) if classifier is not None else NO_CERTIFICATE
    return [(CERTIFICATE_HEADER.lower().encode(), digest.encode())]


def _get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_get_service)]
