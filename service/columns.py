"""Tables as text, for terminals and model cards."""

from collections.abc import Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of equally many cells as lines whose columns begin below each other."""
    kept = list(rows)
    widths = [max(map(len, column)) for column in zip(*kept, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in kept)
    return "\n".join(line.rstrip() for line in lines)
