"""The endpoints, grouped by audience. They parse, call and return; errors pass through to `service.app`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Depends, Request
from starlette.types import Scope

from service.classifier import Classifier
from service.inference import Service
from service.logs import REQUEST, RequestNames

CERTIFICATE_HEADER = "Foldserve-Certificate"
NO_CERTIFICATE = "none"
ABOUT_A_MODEL = frozenset({"/predict", "/verify", "/models/{name}"})  # whose answers name it, errors included


def certificate_of(classifier: Classifier) -> str:
    """Return the digest of the certificate that an answer is given under, or `none`."""
    certificate = classifier.certificate
    return certificate.digest if certificate is not None and certificate.verdict == "certified" else NO_CERTIFICATE


def request_id_of(request: Request) -> str:
    """Return the id that this request was given, which decides between stable and canary."""
    names: RequestNames | None = request.scope.get(REQUEST.name)
    return "" if names is None else names.request_id


@contextmanager
def lease(request: Request, service: Service, name: str | None, version: int | None = None) -> Iterator[Classifier]:
    """Hold `service.lease(name, version)`, whose certificate the answer will name. Raises as that does."""
    with service.lease(name, version, request_id=request_id_of(request)) as classifier:
        request.state.classifier = classifier
        yield classifier


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


async def _get_service(request: Request) -> Service:  # FastAPI runs plain functions in a thread, at 0.2 ms each
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_get_service)]
