"""The artifact that training writes and service reads, made once a session; the tests of training share it."""

from pathlib import Path

import pytest
from training_support import quick_export

from training.packaging import Exported


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The artifact of a quick run, models/digits/1; not to be written to."""
    return quick_export(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def models(exported: Exported) -> Path:
    """The repository that holds it."""
    return exported.folder.parents[1]
