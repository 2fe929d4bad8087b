"""Everything the service refuses or fails at, as one tree; `service.problems` alone turns it into HTTP.

    FoldserveError             a person did something; one line tells what and how to mend it
    ├── ConfigurationError     a setting or flag is wrong
    ├── ArtifactError          a model file is missing, damaged, or fails its own golden images
    │   └── NotExact           a file claims exact sums, and does not keep them
    ├── NotCertified           a model's batch independence could not be shown, and the mode is strict
    ├── DeviceError            the device asked for cannot be had
    ├── EngineLost             a run hangs, or the engine fails at everything: the process ends
    ├── WorkersLost            workers keep dying: the process ends
    ├── AddressUnavailable     the address to listen on cannot be had
    └── ServiceError           a request cannot be answered
        ├── MalformedRequest   the body or a query parameter is not of the documented form
        ├── NotAuthenticated   no API key, or one that nobody knows
        ├── NotPermitted       an API key of another role, or a call that is switched off
        ├── NotSupported       a part of a protocol that is not to be had here
        ├── ModelNotFound      no such model or version is served
        ├── BodyTooSlow        the body did not arrive in time
        ├── NotComparable      a receipt of another model, form or machine
        ├── CallerGone         the connection closed before there was an answer
        ├── LoadFailed         a model could not be loaded; what was served is served still
        ├── AnswerUnchanged    the caller holds this very answer already
        ├── TooLarge           more bytes, pixels or images than the limits allow
        ├── UnsupportedFormat  not an image format that is accepted
        ├── InvalidImage       an accepted format that cannot be decoded
        ├── AllImagesFailed    several images, and each has an error of its own
        ├── RetryLater         the same request may succeed later; carries when
        │   ├── QueueFull      no room
        │   └── NotReady       still loading, or shutting down
        ├── DeadlineExceeded   the answer would come too late
        └── InferenceFailed    the engine failed on this image alone: our fault, not the caller's

Imports nothing of foldserve, so that every room may raise from it.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

NO_BYTES = "the image has no bytes: an empty file or part was sent"


class FoldserveError(Exception):
    """Its text is meant for the person who caused it: what was wrong, what was expected, what to do."""


class ConfigurationError(FoldserveError):
    """A setting or flag is wrong."""


class ArtifactError(FoldserveError):
    """A model file is missing, damaged, or does not give its golden answers."""


class NotExact(ArtifactError):
    """A file claims that its sums are exact integers, and they need not be; names the node."""


class NotCertified(FoldserveError):
    """A model's batch independence could not be shown, and the mode is strict."""


class DeviceError(FoldserveError):
    """The device that was asked for cannot be had."""


class EngineLost(FoldserveError):
    """A run hangs, or the engine fails at everything; nothing but a new process mends it."""


class WorkersLost(FoldserveError):
    """Workers keep dying, or one could not even start."""


class AddressUnavailable(FoldserveError):
    """The address to listen on cannot be had."""


class ServiceError(FoldserveError):
    """A request cannot be answered; the text goes to the client."""


def without_frames(error: ServiceError) -> ServiceError:
    """Return the error without what led to it: its frames hold images, and a cycle of them only the collector ends."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__context__
    return error


class MalformedRequest(ServiceError):
    """The body or a query parameter is not of the documented form."""


class NotAuthenticated(ServiceError):
    """An API key is needed, and none or an unknown one was sent."""


class NotPermitted(ServiceError):
    """The API key has another role, or the call is switched off."""


class NotSupported(ServiceError):
    """A part of the protocol that this service does not have, and never will at this address."""


class ModelNotFound(ServiceError):
    """No model or version of that name is served."""


class BodyTooSlow(ServiceError):
    """The body did not arrive in time."""


class NotComparable(ServiceError):
    """A receipt that this service cannot replay: of another model, form or answer digest."""


class CallerGone(ServiceError):
    """The connection closed before there was an answer; nobody reads this, the metrics count it."""


class LoadFailed(ServiceError):
    """A model of the repository could not be loaded; what was served before is served still."""


class AnswerUnchanged(ServiceError):
    """The caller holds this answer: its entity tag is one of those in If-None-Match."""


class TooLarge(ServiceError):
    """More bytes, pixels or images than the limits allow."""


class UnsupportedFormat(ServiceError):
    """Not an image format that is accepted."""


class InvalidImage(ServiceError):
    """An accepted image format that cannot be decoded."""


class AllImagesFailed(ServiceError):
    """None of several images could be answered; `errors` has one for each, in their order."""

    def __init__(self, errors: list[ServiceError]) -> None:
        super().__init__(f"none of the {len(errors)} images could be answered; the first: {errors[0]}")
        self.errors = errors


class RetryLater(ServiceError):
    """The same request may succeed in `retry_after_s` seconds."""

    def __init__(self, detail: str, *, retry_after_s: int) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class QueueFull(RetryLater):
    """No room for these images now."""


class NotReady(RetryLater):
    """Still loading, or shutting down."""


class DeadlineExceeded(ServiceError):
    """The answer would come after the caller stopped waiting."""


class InferenceFailed(ServiceError):
    """The engine failed on this image, alone."""


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """Return " (did you mean …?)" for the known name closest to `name`, or nothing: the end of many a message."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return f" (did you mean {close[0]}?)" if close else ""


def fault_in(fault: Mapping[str, Any], known: Iterable[str]) -> str:
    """Return in words what pydantic found at one entry of a JSON document; `known` are those that may be there."""
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        told = str(fault["msg"]).removeprefix("Value error, ")
        return f"{where}: {told}" if where else told
    names = list(known)
    return f"{where}: it is not known{nearest(str(fault['loc'][-1]), names)}; known are {', '.join(names)}"
