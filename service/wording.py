"""How numbers stand in every message: counts with their words; shares as Python's `:.2%` writes them."""

SIBILANTS = ("s", "x", "sh", "tch", "nch")  # not the ch of an epoch


def counted(count: int, word: str) -> str:
    """Return a count with thousands apart and its word: `1 image`, `10,000 images`, `0 batches`."""
    ending = "" if count == 1 else "es" if word.endswith(SIBILANTS) else "s"
    return f"{count:,} {word}{ending}"
