"""How log lines look, as text or as JSON; configured once by the command, never at import.

Every line of a request carries its id, and its trace's where it has one. Image content is never logged, nor what a
client named its files.
"""

import json
import logging
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
FIELDS = "fields"  # `logger.info(…, extra={FIELDS: {…}})`: what a machine reads beside the message


@dataclass(frozen=True, slots=True)
class RequestNames:
    """What a request is called: its id, and the id of the trace that it belongs to."""

    request_id: str
    trace_id: str | None = None


REQUEST: ContextVar[RequestNames | None] = ContextVar("request", default=None)


def configure(level: str, form: Literal["text", "json"] = "text") -> None:
    """Send log lines of at least `level` to standard error, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines(FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Its warnings tell of what a client sent, which the client is told; a crowd of them would fill the log.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))  # we say what it says


class TextLines(logging.Formatter):
    """A line for people; the request's id stands at its end."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = super().format(record)
        names = REQUEST.get()
        return line if names is None else f"{line} [{names.request_id}]"


class JsonLines(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, and what there is of request and fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        names = REQUEST.get()
        if names is not None:
            entry["request_id"] = names.request_id
            if names.trace_id is not None:
                entry["trace_id"] = names.trace_id
        entry |= getattr(record, FIELDS, {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)
