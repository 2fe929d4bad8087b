"""The endpoints, grouped by audience. They parse, call and return; errors pass through to `service.app`."""

from typing import Annotated

from fastapi import Depends, Request

from service.classifier import Classifier
from service.inference import Service

CERTIFICATE_HEADER = "Foldserve-Certificate"
NO_CERTIFICATE = "none"


def certificate_of(classifier: Classifier) -> str:
    """Return the digest of the certificate that an answer is given under, or `none`."""
    certificate = classifier.certificate
    return certificate.digest if certificate is not None and certificate.verdict == "certified" else NO_CERTIFICATE


def _get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_get_service)]
