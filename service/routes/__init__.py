"""The endpoints, grouped by audience. They parse, call and return; errors pass through to `service.app`."""

from typing import Annotated

from fastapi import Depends, Request

from service.classifier import Classifier
from service.inference import Service
from service.logs import REQUEST, RequestNames

CERTIFICATE_HEADER = "Foldserve-Certificate"
NO_CERTIFICATE = "none"


def certificate_of(classifier: Classifier) -> str:
    """Return the digest of the certificate that an answer is given under, or `none`."""
    certificate = classifier.certificate
    return certificate.digest if certificate is not None and certificate.verdict == "certified" else NO_CERTIFICATE


def request_id_of(request: Request) -> str:
    """Return the id that this request was given, which decides between stable and canary."""
    names: RequestNames | None = request.scope.get(REQUEST.name)
    return "" if names is None else names.request_id


async def _get_service(request: Request) -> Service:  # FastAPI runs plain functions in a thread, at 0.2 ms each
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_get_service)]
