"""A real app over a real tiny model, shared by the tests that only ask it questions."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Ask, serving

from service.config import Settings


@pytest.fixture(scope="session")
def ask(models: Path) -> Iterator[Ask]:
    with serving(Settings(models=models, device="cpu", max_images=8)) as asked:
        yield asked
