"""The model repository, as the Open Inference Protocol's extension has it: index, load, unload. For administrators."""

import time
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError

from service.errors import MalformedRequest, TooLarge, fault_in
from service.inference import Service
from service.rollout import Rollout
from service.routes import ServiceDependency
from service.routes.access import require_admin
from service.routes.bodies import read_body
from service.schemas import (
    IndexEntryBody,
    IndexQueryBody,
    LoadBody,
    LoadParameters,
    UnloadBody,
    UnloadParameters,
    schema_of,
)

Asked = TypeVar("Asked", bound=BaseModel)
MOST_BYTES = 64 * 2**10  # of a body; what pydantic makes of wrong JSON is hundreds of times its size

router = APIRouter(prefix="/v2/repository", tags=["repository"], dependencies=[require_admin])


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """Describe a body that the endpoint reads itself: FastAPI would read all of it before it asks for the key."""
    return {"requestBody": {"content": {"application/json": {"schema": schema_of(kind)}}}}


@router.post("/index", openapi_extra=_takes(IndexQueryBody))
async def index(request: Request, service: ServiceDependency) -> list[IndexEntryBody]:
    """List every version in the repository, and whether it is loaded; where a load failed, why."""
    only_ready = (await _read(request, service, IndexQueryBody, IndexQueryBody)).ready
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


@router.post("/models/{name}/load", openapi_extra=_takes(LoadBody))
async def load(name: str, request: Request, service: ServiceDependency) -> dict[str, str]:
    """Load a model, or bring it to what its serving.json or the parameters say, without losing a request."""
    parameters = (await _read(request, service, LoadBody, LoadParameters)).parameters
    await service.changes.load(name, parameters.version, _rollout(parameters))
    return {}


@router.post("/models/{name}/unload", openapi_extra=_takes(UnloadBody))
async def unload(name: str, request: Request, service: ServiceDependency) -> dict[str, str]:
    """Serve a model no more; what was accepted is answered."""
    await _read(request, service, UnloadBody, UnloadParameters)
    await service.changes.unload(name)
    return {}


async def _read(request: Request, service: Service, kind: type[Asked], innermost: type[BaseModel]) -> Asked:
    """Return the JSON body, whatever type it claims: `curl -d` and Triton's client name another, or none.

    `innermost` has the entries that its caller may have meant. Raises MalformedRequest, TooLarge, and as `read_body`.
    """
    body = await read_body(request, service.settings, time.monotonic() + service.settings.request_timeout_s)
    if len(body) > MOST_BYTES:
        raise TooLarge(f"the body has {len(body)} bytes, the limit of a repository call is {MOST_BYTES}")
    try:
        return kind.model_validate_json(body or b"{}")
    except ValidationError as error:
        fault = error.errors()[0]
        known = innermost if len(fault["loc"]) > 1 else kind
        raise MalformedRequest(f"the body: {fault_in(fault, known.model_fields)}") from None


def _rollout(parameters: LoadParameters) -> Rollout | None:
    """Return what the parameters ask for beside the version, or None where serving.json decides."""
    asked = parameters.model_dump(exclude={"version"}, exclude_unset=True)
    return Rollout.model_validate(asked) if asked else None
