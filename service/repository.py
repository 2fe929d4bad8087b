"""The model repository on disk, models/<name>/<version>/: list it, load from it. Knows no queue and no web.

Where a version has two forms, `auto` takes the exact one if it measures faster here, and says so in the log.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.artifact import MODEL_NAME, Artifact, has_exact_form, versions
from service.config import RequestedForm
from service.engine import Device, Engine, OpenEngine
from service.errors import ArtifactError, InferenceFailed
from service.exact_engine import ExactEngine
from service.independence.theorem import theorem_of
from service.manifest import Form, Manifest

TIMED_IMAGES = 8  # the batch at which two forms are compared
TIMED_RUNS = 7  # of which the fastest counts: what is above it is other people's

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model that gave its golden answers; `golden_difference` is the largest logit difference it showed."""

    name: str
    version: int
    artifact: Artifact
    engine: Engine
    golden_difference: float

    @property
    def manifest(self) -> Manifest:
        """What the file says about itself."""
        return self.artifact.manifest

    @property
    def digest(self) -> str:
        """The sha256 of the stored file."""
        return self.artifact.digest

    @property
    def form(self) -> Form:
        """Float or exact."""
        return self.artifact.form

    @property
    def golden_images(self) -> int:
        """How many golden images it answered."""
        return len(self.artifact.golden.encoded)

    def settle(self) -> None:
        """Keep only what is needed to serve it: whatever may run has run once."""
        self.engine.settle()
        self.artifact.forget()

    def run(self, images: NDArray[np.uint8], threads: int = 1) -> NDArray[np.float32]:
        """Return logits (N, classes) for images (N, height, width, channels). Raises InferenceFailed at NaN and Inf."""
        logits = self.engine.run(images, threads)
        if not np.isfinite(logits).all():  # JSON has no NaN, and no label follows from one
            raise InferenceFailed(f"model {self.name} gave logits that are not finite")
        return logits


class Repository:
    """Finds and loads models below one folder."""

    def __init__(self, root: Path, open_engine: OpenEngine, form: RequestedForm = "auto") -> None:
        self._root = root
        self._open_engine = open_engine
        self._form = form

    def names(self) -> list[str]:
        """Return the models that have a version, by name. Raises ArtifactError where the folder holds none."""
        if not self._root.is_dir():
            raise ArtifactError(f"{self._root}: no such folder; name the model repository with --models")
        try:
            names = sorted(
                folder.name for folder in self._root.iterdir() if MODEL_NAME.fullmatch(folder.name) and versions(folder)
            )
        except OSError as error:
            raise ArtifactError(
                f"{error.filename} cannot be read ({error.strerror}); let user {os.getuid()} read and enter it"
            ) from None
        if not names:
            raise ArtifactError(
                f"{self._root} holds no model; expected {self._root}/<name>/<version>/model.onnx, "
                "as `foldserve export` writes it"
            )
        return names

    def load(self, name: str, device: Device, version: int | None = None, form: Form | None = None) -> Model:
        """Load a model, by default its highest version, and check its golden images. Raises ArtifactError.

        `form` stands in for the repository's own choice, so that processes side by side serve the same one.
        """
        present = versions(self._root / name) if MODEL_NAME.fullmatch(name) else []
        if not present:
            raise ArtifactError(f"{self._root} holds no model {name}; it has {', '.join(self.names())}")
        if version is not None and version not in present:
            raise ArtifactError(
                f"{self._root / name} holds no version {version}; it has {', '.join(map(str, present))}"
            )
        version = present[-1] if version is None else version
        forms = self._forms(name, version) if form is None else (form,)
        models = [self._open(name, version, one, device) for one in forms]
        return models[0] if len(models) == 1 else _fastest(models)

    def _forms(self, name: str, version: int) -> tuple[Form, ...]:
        folder = self._root / name / str(version)
        if self._form == "auto":
            return ("exact", "float") if has_exact_form(folder) else ("float",)
        if self._form == "exact" and not has_exact_form(folder):
            raise ArtifactError(f"{folder} has no exact form; export the model again, or serve it with --form float")
        return (self._form,)

    def _open(self, name: str, version: int, form: Form, device: Device) -> Model:
        artifact = Artifact.load(self._root / name / str(version), form)
        try:
            engine = self._engine(artifact, device)
            difference = _check(artifact, engine)
        except ArtifactError as error:
            raise ArtifactError(f"{artifact.path}: {error}") from None
        return Model(name, version, artifact, engine, difference)

    def _engine(self, artifact: Artifact, device: Device) -> Engine:
        if theorem_of(artifact) is None:
            return self._open_engine(artifact.model_bytes, device)
        return ExactEngine(artifact.model_bytes, device, self._open_engine)


def _check(artifact: Artifact, engine: Engine) -> float:
    """Return the largest difference from the golden answers; an exact model tries its executions in turn."""
    while True:
        try:
            return artifact.golden.check(engine.run, artifact.manifest.preprocessing, artifact.form)
        except ArtifactError as error:
            if not isinstance(engine, ExactEngine) or not engine.fall_back():
                raise
            logger.warning("%s: %s; going on with the execution %s", artifact.path, error, engine.execution)


def _fastest(models: Sequence[Model]) -> Model:
    """Return the model whose run of a batch takes the least time on one thread, of several forms of one version."""
    golden = models[0].artifact.golden.pixels
    images = np.resize(golden, (TIMED_IMAGES, *golden.shape[1:]))
    seconds = [min(_seconds(model, images) for _ in range(TIMED_RUNS)) for model in models]
    best = int(np.argmin(seconds))
    costs = (1000 * took / TIMED_IMAGES for took in seconds)
    told = ", ".join(f"{model.form} {cost:.3f} ms an image" for model, cost in zip(models, costs, strict=True))
    logger.info("%s version %d: %s; serving the %s form", models[0].name, models[0].version, told, models[best].form)
    return models[best]


def _seconds(model: Model, images: NDArray[np.uint8]) -> float:
    started = time.perf_counter()
    model.run(images)
    return time.perf_counter() - started
