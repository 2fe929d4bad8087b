"""Extensions of the Open Inference Protocol: statistics, and a plain word about those that are not to be had."""

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request

from service.classifier import Classifier
from service.errors import NotSupported
from service.inference import Service
from service.routes import ServiceDependency
from service.routes.access import require_predict
from service.routes.v2 import MODEL, VERSION, find
from service.statistics import statistics_of

router = APIRouter(prefix="/v2", tags=["open inference protocol"], dependencies=[require_predict])


@router.get("/models/stats")
async def all_statistics(service: ServiceDependency) -> dict[str, Any]:
    """Tell counts and durations of every version that is loaded, over all workers."""
    loaded = [one for deployment in service.deployments() for one in deployment.classifiers()]
    return await _told(service, loaded)


@router.get(MODEL + "/stats")
@router.get(VERSION + "/stats")
async def statistics(name: str, request: Request, service: ServiceDependency, version: str = "") -> dict[str, Any]:
    """Tell counts and durations of one version, by default of the stable one."""
    return await _told(service, [find(request, service, name, version)])


async def _told(service: Service, classifiers: Iterable[Classifier]) -> dict[str, Any]:
    await service.refresh_metrics()
    counts = service.metrics.counts()
    models = [one.model for one in classifiers]
    told = [statistics_of(one.name, one.version, counts.get((one.name, str(one.version)), ())) for one in models]
    return {"model_stats": told}


@router.api_route("/systemsharedmemory/{call:path}", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/cudasharedmemory/{call:path}", methods=["GET", "POST"], include_in_schema=False)
async def shared_memory(call: str) -> None:  # noqa: ARG001 - whatever is asked of it
    """Say that there is none. Raises NotSupported."""
    raise NotSupported("shared memory is not supported; send tensors in the body and read them from the answer")


@router.api_route("/trace/setting", methods=["GET", "POST"], include_in_schema=False)
@router.api_route(MODEL + "/trace/setting", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/logging", methods=["GET", "POST"], include_in_schema=False)
async def settings() -> None:
    """Say that they are those of the start. Raises NotSupported."""
    raise NotSupported(
        "tracing and logging are not changed by calls; start the service with --otlp-endpoint, --log-level or "
        "--log-requests"
    )
