"""The names of the classes, one a line or as a JSON list."""

import json
from pathlib import Path
from typing import Any

from service.wording import counted
from training.errors import UsageError

EXPECTED = 'expected one label a line, or, in a file named *.json, ["cat", "dog"], {"0": "cat"} or {"cat": 0}'


def read_labels(path: Path | None, classes: int) -> tuple[str, ...]:
    """Return one label for each class; without a file their numbers. Raises UsageError where they do not fit."""
    if path is None:
        return tuple(str(index) for index in range(classes))
    labels = _read(path)
    while labels and not labels[-1]:
        labels.pop()
    if len(labels) != classes:
        raise UsageError(
            f"--labels {path} has {counted(len(labels), 'label')}, the model has {counted(classes, 'class')}"
        )
    if twice := next((one for one in labels if labels.count(one) > 1), None):
        raise UsageError(f"--labels {path}: {twice!r} is there twice; labels must differ from one another")
    return tuple(labels)


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        labels = _listed(json.loads(text)) if path.suffix.lower() == ".json" else text.splitlines()
    except OSError as error:
        raise UsageError(f"--labels {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--labels {path}: {error}; {EXPECTED}") from None
    return [str(one).strip() for one in labels]


def _listed(content: Any) -> list[Any]:
    """Return the names in a JSON document in the order of their numbers. Raises ValueError where it is none of labels.

    Keras has [wordnet id, name] for each number, torchvision's `class_to_idx` the number for each name.
    """
    if isinstance(content, dict):
        numbered = all(map(str.isdecimal, content))
        by_name = {number: name for name, number in content.items() if type(number) is int}
        names = {int(number): name for number, name in content.items()} if numbered else by_name
        content = [names[number] for number in sorted(names)] if len(names) == len(content) else None
    named = [one[-1] if isinstance(one, list) and one else one for one in content] if isinstance(content, list) else []
    if not named or not all(isinstance(one, str | int | float) for one in named):
        raise ValueError("it is not a list of names")
    return named
