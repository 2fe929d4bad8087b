"""For those who run the service: live, ready, metrics, and what this process is."""

import platform
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Response

from service.classifier import Classifier
from service.engine import describe_runtime
from service.errors import NotReady
from service.inference import Service
from service.metrics import CONTENT_TYPE
from service.routes import NO_CERTIFICATE, ServiceDependency, warrant_of
from service.schemas import HealthBody

router = APIRouter(tags=["operations"])

LIMITS = (
    "max_body_bytes",
    "max_bytes_in_flight",
    "max_image_pixels",
    "max_pixels_in_flight",
    "max_images",
    "max_queue_size",
    "max_batch_size",
    "request_timeout_s",
    "body_timeout_s",
    "max_head_bytes",
    "head_timeout_s",
    "max_connections",
)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def live(service: ServiceDependency) -> HealthBody:
    """200 while the process can do its work; when it is not, restart it."""
    if service.status == "failed":
        raise NotReady("the service failed; see its log", retry_after_s=5)
    return HealthBody(status="live")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def ready(service: ServiceDependency) -> HealthBody:
    """200 while requests are answered, also `degraded`; 503 while loading or draining."""
    if not service.is_ready:
        raise NotReady(f"the service is {_state(service)}", retry_after_s=1)
    return HealthBody(status="degraded" if service.is_degraded else "ready")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: ServiceDependency) -> Response:
    """Prometheus's text format."""
    await service.refresh_metrics()
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)


def _state(service: Service) -> str:
    view = service.crew.view
    if view is None or view.workers_ready == view.workers or service.status == "failed":
        return service.status
    return f"{service.status}: {view.workers_ready} of {view.workers} workers are ready"


@router.get("/info")
async def info(service: ServiceDependency) -> dict[str, Any]:
    """Build, device, limits, and the models with their digests."""
    device, view = service.device, service.crew.view
    return {
        "name": "foldserve",
        "version": version("foldserve"),
        "python": platform.python_version(),
        "runtime": describe_runtime(),
        "device": None
        if device is None
        else {"requested": device.requested, "used": device.used, "why": device.reason},
        "status": service.status,
        "workers": {"asked": service.settings.workers, "ready": view.workers_ready if view else int(service.is_ready)},
        "formats": list(service.accepted.formats),
        "limits": {name: getattr(service.settings, name) for name in LIMITS},
        "mode": service.settings.mode,
        "models": {one.model.name: _identity(one) for one in service.classifiers()},
    }


def _identity(classifier: Classifier) -> dict[str, Any]:
    model, certificate = classifier.model, classifier.certificate
    digest = warrant_of(classifier).digest
    return {
        "version": model.version,
        "form": model.form,
        "digest": model.digest,
        "certificate": None if digest == NO_CERTIFICATE else digest,
        "answer_digest": certificate.answer_digest if certificate else None,
        "degraded": classifier.runner.is_degraded,
    }
