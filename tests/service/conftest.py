"""A real app over a real tiny model, shared by the tests that only ask it questions."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from reload_support import tiny
from support import Ask, serving

from service.config import Settings


@pytest.fixture(scope="session")
def ask(models: Path) -> Iterator[Ask]:
    with serving(Settings(models=models, device="cpu", max_images=8)) as asked:
        yield asked


@pytest.fixture
def repository(tmp_path):
    """A repository of our own with version 1 of a tiny model; the seed of each version is its number."""
    tiny(1).write(tmp_path, 1)
    return tmp_path
