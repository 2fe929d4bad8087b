"""The model repository, as the Open Inference Protocol's extension has it: index, load, unload. For administrators."""

from typing import Annotated

from fastapi import APIRouter, Body

from service.rollout import Rollout
from service.routes import ServiceDependency
from service.routes.access import require_admin
from service.schemas import IndexEntryBody, IndexQueryBody, LoadBody, LoadParameters, UnloadBody

router = APIRouter(
    prefix="/v2/repository",
    tags=["repository"],
    dependencies=[require_admin],
    strict_content_type=False,  # Triton's client sends its JSON without a type; a page of another host has no key
)


@router.post("/index")
async def index(
    service: ServiceDependency, body: Annotated[IndexQueryBody | None, Body()] = None
) -> list[IndexEntryBody]:
    """List every version in the repository, and whether it is loaded; where a load failed, why."""
    only_ready = body is not None and body.ready
    return [
        IndexEntryBody(
            name=entry.name,
            version=str(entry.version),
            state="READY" if entry.is_ready else "UNAVAILABLE",
            reason=entry.reason,
        )
        for entry in service.index()
        if entry.is_ready or not only_ready
    ]


@router.post("/models/{name}/load")
async def load(
    name: str, service: ServiceDependency, body: Annotated[LoadBody | None, Body()] = None
) -> dict[str, str]:
    """Load a model, or bring it to what its serving.json or the parameters say, without losing a request."""
    parameters = body.parameters if body is not None else LoadParameters()
    await service.load(name, parameters.version, _rollout(parameters))
    return {}


@router.post("/models/{name}/unload")
async def unload(
    name: str, service: ServiceDependency, _: Annotated[UnloadBody | None, Body()] = None
) -> dict[str, str]:
    """Serve a model no more; what was accepted is answered."""
    await service.unload(name)
    return {}


def _rollout(parameters: LoadParameters) -> Rollout | None:
    """Return what the parameters ask for beside the version, or None where serving.json decides."""
    asked = parameters.model_dump(exclude={"version"}, exclude_unset=True)
    return Rollout.model_validate(asked) if asked else None
