"""How log lines look; called once by the command, never at import. Image content is never logged."""

import logging
import sys

FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


def configure(level: str) -> None:
    """Send log lines of at least `level` to standard error, one line each."""
    logging.basicConfig(stream=sys.stderr, level=level.upper(), format=FORMAT, force=True)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))  # we say what it says
