"""POST or PUT an image, get its label."""

import hashlib
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic_core import to_json

from service.answers import predict_body
from service.classifier import Classifier, Outcome
from service.errors import AnswerUnchanged
from service.inference import Service
from service.routes import ServiceDependency, lease
from service.routes.access import require_predict
from service.routes.bodies import expected_bytes, read_uploads
from service.routes.connection import since_last_byte_s, while_connected
from service.routes.outcomes import settle
from service.routes.terms import HEADERS, terms_of
from service.schemas import ImagesBody, PredictBody, PredictQuery
from service.tracing import stage

JSON = "application/json"
MEDIA_TYPE = (b"content-type", JSON.encode())

router = APIRouter(tags=["predict"], dependencies=[require_predict])

FILE = {"type": "string", "format": "binary"}
REQUEST_BODY = {
    "required": True,
    "content": {
        "image/*": {"schema": FILE},
        "application/octet-stream": {"schema": FILE},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"file": {"type": "array", "items": FILE}}, "required": ["file"]}
        },
        "application/json": {"schema": ImagesBody.model_json_schema()},
    },
}
EXTRA = {"requestBody": REQUEST_BODY, "parameters": HEADERS}


@router.post("/predict", response_model=PredictBody, openapi_extra=EXTRA)
@router.put("/predict", response_model=PredictBody, openapi_extra=EXTRA)
async def predict(request: Request, query: Annotated[PredictQuery, Query()], service: ServiceDependency) -> Response:
    """Label one image or several: a raw body, multipart parts named `file`, or base64 in JSON."""
    terms = terms_of(request.headers, service.settings, since_last_byte_s=partial(since_last_byte_s, request))
    with lease(request, service, query.model, query.version) as classifier:
        if query.receipt:
            classifier.check_receipts()
        classifier.check_room()
        started = perf_counter()
        with service.receiving(expected_bytes(request, service.settings)) as held:
            uploads = await read_uploads(request, service.settings, terms.deadline)
            held.correct(sum(len(upload.encoded) for upload in uploads))
            _observe(classifier, "read", started)
            encoded = [upload.encoded for upload in uploads if upload.fault is None]
            work = classifier.classify(encoded, deadline=terms.deadline, priority=terms.priority)
            found = iter(await while_connected(request, work))
    outcomes = [upload.fault or next(found) for upload in uploads]
    names = [upload.filename for upload in uploads]
    held_tags = request.headers.get("if-none-match", "")
    content, fields = write_answer(classifier, service, query, names, outcomes, held_tags)
    response = Response(content, media_type=JSON)
    response.raw_headers.extend(fields)
    return response


def write_answer(
    classifier: Classifier,
    service: Service,
    query: PredictQuery,
    names: Sequence[str | None],
    outcomes: Sequence[Outcome],
    held_tags: str,
) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return the JSON of a good answer and the header fields that are its own; count what became of its images.

    `held_tags` is what If-None-Match says. Raises as `settle`, and AnswerUnchanged where it holds this answer.
    """
    is_whole = settle(classifier, outcomes)
    started = perf_counter()
    receipt = partial(classifier.receipt, key=service.receipt_key) if query.receipt else None
    body = predict_body(classifier.model, names, outcomes, k=query.top_k, with_logits=query.logits, receipt=receipt)
    content = to_json(body)
    fields = [(b"etag", _checked_tag(content, held_tags).encode())] if is_whole and classifier.shares else []
    _observe(classifier, "encode", started)
    return content, fields


def _observe(classifier: Classifier, name: Literal["read", "encode"], started: float) -> None:
    seconds = perf_counter() - started
    classifier.metrics.observe(name, seconds)
    stage(name, seconds)


def _checked_tag(content: bytes, held: str) -> str:
    """Return the answer's strong entity tag. Raises AnswerUnchanged where If-None-Match has it (RFC 9110, 13.1.2)."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    if held and tag in [one.strip().removeprefix("W/") for one in held.split(",")]:
        raise AnswerUnchanged(f"the answer is still the one with the entity tag {tag}")
    return tag
