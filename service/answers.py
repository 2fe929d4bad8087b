"""The body of /predict, built from outcomes: the same for the endpoint and for `foldserve predict`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from service.classifier import Answered, Outcome
from service.errors import ServiceError
from service.independence.receipts import Receipt
from service.manifest import Form
from service.postprocessing import rank
from service.problems import problem
from service.repository import Model


def predict_body(
    model: Model,
    filenames: Sequence[str | None],
    outcomes: Sequence[Outcome],
    *,
    k: int,
    with_logits: bool,
    receipt: Callable[[Answered], Receipt] | None = None,
) -> dict[str, Any]:
    """Return `service.schemas.PredictBody` as plain data, one prediction or error for each image, in order."""
    predictions = [
        {"filename": filename, **_prediction(outcome, model.manifest.labels, k, with_logits, receipt)}
        for filename, outcome in zip(filenames, outcomes, strict=True)
    ]
    form: Form = model.form
    return {"model": model.name, "version": model.version, "form": form, "predictions": predictions}


def _prediction(
    outcome: Outcome,
    labels: tuple[str, ...],
    k: int,
    with_logits: bool,  # noqa: FBT001 - one caller, which names it
    receipt: Callable[[Answered], Receipt] | None,
) -> dict[str, Any]:
    if isinstance(outcome, ServiceError):
        return {"error": problem(outcome)}
    top = [{"label": labels[index], "index": index, "score": score} for index, score in rank(outcome.logits, k)]
    logits = (
        {"logits": outcome.logits.astype(np.float64).tolist()} if with_logits else {}
    )  # exact, so the bits read back
    receipts = {"receipt": receipt(outcome).model_dump()} if receipt else {}
    return {**top[0], "top": top, **logits, **receipts}
