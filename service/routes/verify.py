"""Replays a receipt: the same image alone at the reference shape, and do the bits agree?"""

from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from service.classifier import Classifier
from service.errors import MalformedRequest, NotComparable, ServiceError
from service.independence.receipts import Receipt, logits_digest, pixels_digest
from service.routes import ServiceDependency, lease
from service.routes.access import require_predict
from service.routes.bodies import expected_bytes, read_receipt_and_file
from service.routes.connection import since_last_byte_s, while_connected
from service.routes.terms import HEADERS, terms_of
from service.schemas import VerifyBody

router = APIRouter(tags=["predict"], dependencies=[require_predict])

FORM = {
    "type": "object",
    "properties": {"receipt": {"type": "string"}, "file": {"type": "string", "format": "binary"}},
    "required": ["receipt", "file"],
}
REQUEST_BODY = {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}


class NoParameters(BaseModel):
    """An unknown parameter is an error, not a surprise."""

    model_config = ConfigDict(extra="forbid")


@router.post("/verify", openapi_extra={"requestBody": REQUEST_BODY, "parameters": HEADERS})
async def verify(request: Request, _: Annotated[NoParameters, Query()], service: ServiceDependency) -> VerifyBody:
    """Run the image of a receipt again, alone, and compare pixels and bits. A replay does not prove who answered."""
    terms = terms_of(request.headers, service.settings, since_last_byte_s=partial(since_last_byte_s, request))
    with service.receiving(expected_bytes(request, service.settings)) as held:
        text, encoded = await read_receipt_and_file(request, service.settings, terms.deadline)
        held.correct(len(encoded))
        receipt = _parse(text)
        with lease(request, service, receipt.model, receipt.version) as classifier:
            _check_comparable(receipt, classifier)
            work = classifier.classify([encoded], deadline=terms.deadline, priority=terms.priority, is_replay=True)
            (outcome,) = await while_connected(request, work)
    if isinstance(outcome, ServiceError):
        raise outcome
    same_pixels = pixels_digest(outcome.pixels) == receipt.pixels
    same_bits = logits_digest(outcome.logits) == receipt.logits if same_pixels else None
    signature = _signature(receipt, service.receipt_key)
    return VerifyBody(
        comparable=same_pixels,
        same_pixels=same_pixels,
        same_bits=same_bits,
        signature=signature,
        detail=_detail(same_bits, signature),
    )


def _parse(text: str) -> Receipt:
    try:
        return Receipt.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the part"
        raise MalformedRequest(f"receipt: {where}: {first['msg']}") from None


def _check_comparable(receipt: Receipt, classifier: Classifier) -> None:
    model, certificate = classifier.model, classifier.certificate
    if (receipt.model_digest, receipt.form) != (model.digest, model.form):
        raise NotComparable(f"the receipt is of another file or form than model {model.name} version {model.version}")
    if certificate is None or certificate.answer_digest != receipt.answer_digest or certificate.reference is None:
        raise NotComparable(
            "the receipt was given on another machine, runtime or setting, whose bits are not comparable to these; "
            "ask a service that shows the same answer_digest at /info"
        )


def _signature(receipt: Receipt, key: bytes | None) -> Literal["valid", "invalid", "not checked"]:
    if key is None:
        return "not checked"
    return "valid" if receipt.is_signed_by(key) else "invalid"


def _detail(same_bits: bool | None, signature: str) -> str:  # noqa: FBT001 - a finding, not a switch
    found = {
        None: "the image decodes to other pixels than the receipt's: another image, or another decoder",
        True: "the model gives the same bits for these pixels",
        False: "the model gives other bits for these pixels",
    }[same_bits]
    origin = "" if signature == "valid" else "; a replay does not prove who gave the answer"
    return found + origin
