"""What is asked of an export about its exact form."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Wish = Literal["auto", "require", "off"]
MAX_DROP = 1.0  # points of accuracy, where nothing else is asked for


@dataclass(frozen=True, slots=True)
class ExactOptions:
    """What is asked for: `auto` writes the float form alone where there is no exact one; `max_drop` is in points."""

    wish: Wish = "auto"
    max_drop: float = MAX_DROP
    float_twin: Path | None = None


OFF = ExactOptions("off")
