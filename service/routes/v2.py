"""The Open Inference Protocol: health, metadata, infer. The same models, queue, limits and bits as /predict."""

import asyncio
import time
from functools import partial
from importlib.metadata import version as version_of
from time import perf_counter
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from service.classifier import Answered, Classifier
from service.errors import InvalidImage, MalformedRequest, ServiceError, TooLarge, UnsupportedFormat
from service.inference import Service
from service.queueing import Priority
from service.routes import ServiceDependency, choose_classifier, lease
from service.routes.access import require_predict
from service.routes.bodies import expected_bytes, read_body
from service.routes.connection import since_last_byte_s, while_connected
from service.routes.operations import live, ready
from service.routes.outcomes import settle
from service.routes.terms import Terms, priority_of_level, terms_of
from service.schemas import schema_of
from service.tensors import INPUT, OUTPUT, InferBody, InferRequest, infer_answer, parse_infer

HEADER_LENGTH = "Inference-Header-Content-Length"
MICRO = 1e-6
# In Triton's words; its schedule_policy is the parameters `priority` and `timeout`.
EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "statistics",
]
REQUEST_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": schema_of(InferBody)},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}
MODEL = "/models/{name}"
VERSION = "/models/{name}/versions/{version}"

router = APIRouter(prefix="/v2", tags=["open inference protocol"])
keyed = APIRouter(prefix="/v2", tags=["open inference protocol"], dependencies=[require_predict])


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", response_class=Response)
async def is_live(service: ServiceDependency) -> Response:
    """200 while the process can do its work, as /healthz."""
    await live(service)
    return Response()


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready", response_class=Response)
async def is_ready(service: ServiceDependency) -> Response:
    """200 while requests are answered, as /readyz."""
    await ready(service)
    return Response()


@router.get("")
async def server_metadata() -> dict[str, Any]:
    """Name, version and the extensions of the protocol that work here."""
    return {"name": "foldserve", "version": version_of("foldserve"), "extensions": EXTENSIONS}


@keyed.get(MODEL + "/ready", response_class=Response)
@keyed.get(VERSION + "/ready", response_class=Response)
async def model_is_ready(name: str, request: Request, service: ServiceDependency, version: str = "") -> Response:
    """200 when the model is served."""
    find(request, service, name, version)
    return Response()


@keyed.get(MODEL)
@keyed.get(VERSION)
async def model_metadata(name: str, request: Request, service: ServiceDependency, version: str = "") -> dict[str, Any]:
    """Describe the input and the output; encoded images as BYTES [n] are taken too."""
    model = find(request, service, name, version).model
    loaded = [model.version] if version else sorted(service.deployment(name).plan.versions)
    return {
        "name": model.name,
        "versions": [str(one) for one in loaded],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *_size(model.manifest.preprocessing)]}],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, len(model.manifest.labels)]}],
    }


@keyed.get(MODEL + "/config")
@keyed.get(VERSION + "/config")
async def model_config(name: str, request: Request, service: ServiceDependency, version: str = "") -> dict[str, Any]:
    """Describe the same in the words of Triton's model configuration, which load generators ask for."""
    model = find(request, service, name, version).model
    size = list(_size(model.manifest.preprocessing))
    return {
        "name": model.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": service.settings.max_images,
        "input": [{"name": INPUT, "data_type": "TYPE_UINT8", "dims": size}],
        "output": [{"name": OUTPUT, "data_type": "TYPE_FP32", "dims": [len(model.manifest.labels)]}],
    }


@keyed.post(MODEL + "/infer", openapi_extra={"requestBody": REQUEST_BODY})
@keyed.post(VERSION + "/infer", openapi_extra={"requestBody": REQUEST_BODY})
async def infer(name: str, request: Request, service: ServiceDependency, version: str = "") -> Response:
    """Give the logits of pixels or of encoded images; one bad image fails the request, which the protocol demands."""
    waited = partial(since_last_byte_s, request)
    terms, arrived = terms_of(request.headers, service.settings, since_last_byte_s=waited), time.monotonic() - waited()
    with lease(request, service, name, _number(version)) as classifier:
        classifier.check_room()
        started = perf_counter()
        with service.receiving(expected_bytes(request, service.settings)):
            body = await read_body(request, service.settings, terms.deadline)
            asked = await asyncio.to_thread(
                parse_infer, body, _header_length(request), _size_of(classifier), service.settings.max_images
            )
            classifier.metrics.observe("read", perf_counter() - started)
            deadline = min(terms.deadline, arrived + _timeout_s(service, asked))
            work = classifier.classify(asked.images, deadline=deadline, priority=_priority(asked, terms))
            outcomes = await while_connected(request, work)
    settle(classifier, outcomes)
    with classifier.metrics.timed("encode"):
        return _respond(classifier, asked, np.stack([_logits(*one) for one in enumerate(outcomes)]))


def find(request: Request, service: Service, name: str, version: str) -> Classifier:
    """Return a model's version, by default the stable one. Raises as `choose_classifier`, and MalformedRequest."""
    return choose_classifier(request, service, name, _number(version))


def _number(version: str) -> int | None:
    if version and not (version.isascii() and version.isdecimal() and len(version) < 10):
        raise MalformedRequest(f"version {version[:20]}: expected a whole number")
    return int(version) if version else None


def _size(preprocessing: Any) -> tuple[int, int, int]:
    return (*preprocessing.size, preprocessing.channels)


def _size_of(classifier: Classifier) -> tuple[int, int, int]:
    return _size(classifier.model.manifest.preprocessing)


def _header_length(request: Request) -> int | None:
    text = request.headers.get(HEADER_LENGTH)
    if text is not None and not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise MalformedRequest(f"{HEADER_LENGTH}: {text[:20]} is not a number of bytes")
    return None if text is None else int(text)


def _priority(asked: InferRequest, terms: Terms) -> Priority:
    return priority_of_level(asked.priority) if asked.priority else terms.priority


def _timeout_s(service: Service, asked: InferRequest) -> float:
    limit = service.settings.request_timeout_s
    return min(limit, asked.timeout_us * MICRO) if asked.timeout_us else limit


def _logits(index: int, outcome: Answered | ServiceError) -> Any:
    if isinstance(outcome, TooLarge | UnsupportedFormat | InvalidImage):
        raise type(outcome)(f"image {index}: {outcome}")
    if isinstance(outcome, ServiceError):
        raise outcome
    return outcome.logits


def _respond(classifier: Classifier, asked: InferRequest, logits: Any) -> Response:
    model = classifier.model
    head = {"model_name": model.name, "model_version": str(model.version)}
    text, raw = infer_answer(asked, head, logits, model.manifest.labels)
    if not asked.binary:
        return Response(text, media_type="application/json")
    headers = {HEADER_LENGTH: str(len(text))}
    return Response(text + raw, headers=headers, media_type="application/octet-stream")
