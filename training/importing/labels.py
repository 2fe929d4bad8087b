"""The names of the classes, one a line or as a JSON list."""

import json
from pathlib import Path

from service.wording import counted
from training.errors import UsageError


def read_labels(path: Path | None, classes: int) -> tuple[str, ...]:
    """Return one label for each class; without a file their numbers. Raises UsageError where they do not fit."""
    if path is None:
        return tuple(str(index) for index in range(classes))
    try:
        text = path.read_text(encoding="utf-8")
        labels = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except OSError as error:
        raise UsageError(f"--labels {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(
            f"--labels {path}: {error}; expected one label a line, or JSON in a file named *.json"
        ) from None
    if isinstance(labels, dict):  # {"0": "tench", …}, or [wordnet id, name] pairs as Keras has them
        labels = [labels[key] for key in sorted(labels, key=int)] if all(map(str.isdecimal, labels)) else list(labels)
    labels = [str(one[-1] if isinstance(one, list) else one).strip() for one in labels]
    while labels and not labels[-1]:
        labels.pop()
    if len(labels) != classes:
        raise UsageError(
            f"--labels {path} has {counted(len(labels), 'label')}, the model has {counted(classes, 'class')}"
        )
    if twice := next((one for one in labels if labels.count(one) > 1), None):
        raise UsageError(f"--labels {path}: {twice!r} is there twice; labels must differ from one another")
    return tuple(labels)
