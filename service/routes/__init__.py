"""The endpoints, grouped by audience. They parse, call and return; errors pass through to `service.app`."""

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Annotated, NamedTuple

from fastapi import Depends, Request
from starlette.types import Scope

from service.classifier import Classifier
from service.inference import Service
from service.logs import REQUEST, RequestNames

CERTIFICATE_HEADER = "Foldserve-Certificate"
GUARANTEE_HEADER = "Foldserve-Guarantee"
NO_CERTIFICATE = "none"
ABOUT_A_MODEL = frozenset({"/predict", "/verify", "/models/{name}"})  # whose answers name it, errors included


class Warrant(NamedTuple):
    """What an answer is given under: a certificate's digest, and why its bits do not hang on its batch, in words."""

    digest: str = NO_CERTIFICATE
    ground: str = NO_CERTIFICATE


def warrant_of(classifier: Classifier) -> Warrant:
    """Return what a model's answers are given under, by theorem or by measurement; `none` without a certificate."""
    certificate = classifier.certificate
    if certificate is None or certificate.verdict != "certified":
        return Warrant()
    ground = "by theorem" if certificate.theorem is not None else "by measurement"
    return Warrant(classifier.certificate_digest or NO_CERTIFICATE, ground)


def request_id_of(request: Request) -> str:
    """Return the id that this request was given, which decides between stable and canary."""
    names: RequestNames | None = request.scope.get(REQUEST.name)
    return "" if names is None else names.request_id


def lease(
    request: Request, service: Service, name: str | None, version: int | None = None
) -> AbstractContextManager[Classifier]:
    """Return `service.lease(name, version)`, whose certificate the answer will name. Raises as that does."""
    opened = service.lease(name, version, request_id=request_id_of(request))
    request.state.classifier = opened.classifier
    return opened


def choose_classifier(request: Request, service: Service, name: str | None, version: int | None = None) -> Classifier:
    """Return `service.classifier(name, version)`, whose certificate the answer will name. Raises as that does."""
    classifier = service.classifier(name, version)
    request.state.classifier = classifier
    return classifier


def certificate_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Return the headers that name the certificate and its ground; `none` where no model was found."""
    path = getattr(scope.get("route"), "path", "")
    if path not in ABOUT_A_MODEL and not path.startswith("/v2/models/"):
        return []
    classifier = scope.get("state", {}).get("classifier")
    if classifier is None:
        return [*_fields(Warrant())]
    return [*_fields(warrant_of(classifier))]


@lru_cache(64)
def _fields(warrant: Warrant) -> tuple[tuple[bytes, bytes], ...]:
    told = {CERTIFICATE_HEADER: warrant.digest, GUARANTEE_HEADER: warrant.ground}
    return tuple((name.lower().encode(), value.encode()) for name, value in told.items())


async def _get_service(request: Request) -> Service:  # FastAPI runs plain functions in a thread, at 0.2 ms each
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_get_service)]
