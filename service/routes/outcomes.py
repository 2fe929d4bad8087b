"""Counts what became of a request's images, and decides whether there is anything to answer with."""

from collections.abc import Sequence

from service.classifier import Classifier, Outcome
from service.errors import AllImagesFailed, ServiceError
from service.problems import slug


def settle(classifier: Classifier, outcomes: Sequence[Outcome]) -> bool:
    """Count the outcomes; return whether all are good.

    Raises the error of a lone bad image, AllImagesFailed where all of several are bad.
    """
    errors = [outcome for outcome in outcomes if isinstance(outcome, ServiceError)]
    for outcome in outcomes:
        classifier.metrics.outcome(slug(outcome) if isinstance(outcome, ServiceError) else "ok")
    if len(errors) == len(outcomes):
        raise errors[0] if len(errors) == 1 else AllImagesFailed(errors)
    return not errors
