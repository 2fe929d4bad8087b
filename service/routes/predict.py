"""POST or PUT an image, get its label."""

import json
import time
from functools import partial
from time import perf_counter
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from service.answers import predict_body
from service.routes import ServiceDependency, choose_classifier
from service.routes.access import require_predict
from service.routes.bodies import expected_bytes, read_uploads
from service.routes.connection import while_connected
from service.routes.outcomes import settle
from service.schemas import ImagesBody, PredictBody, PredictQuery

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


@router.post("/predict", response_model=PredictBody, openapi_extra={"requestBody": REQUEST_BODY})
@router.put("/predict", response_model=PredictBody, openapi_extra={"requestBody": REQUEST_BODY})
async def predict(request: Request, query: Annotated[PredictQuery, Query()], service: ServiceDependency) -> Response:
    """Label one image or several: a raw body, multipart parts named `file`, or base64 in JSON."""
    classifier = choose_classifier(request, service, query.model, query.version)
    if query.receipt:
        classifier.check_receipts()
    deadline = time.monotonic() + service.settings.request_timeout_s
    classifier.check_room()
    started = perf_counter()
    with service.receiving(expected_bytes(request, service.settings)):
        uploads = await read_uploads(request, service.settings)
    classifier.metrics.observe("read", perf_counter() - started)
    work = classifier.classify([upload.encoded for upload in uploads], deadline=deadline)
    outcomes = await while_connected(request, work)
    settle(classifier, outcomes)
    with classifier.metrics.timed("encode"):
        names = [upload.filename for upload in uploads]
        receipt = partial(classifier.receipt, key=service.receipt_key) if query.receipt else None
        body = predict_body(classifier.model, names, outcomes, k=query.top_k, with_logits=query.logits, receipt=receipt)
        return Response(json.dumps(body, ensure_ascii=False), media_type="application/json")
