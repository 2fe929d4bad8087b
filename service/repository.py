"""The model repository on disk, models/<name>/<version>/: list it, load from it. Knows no queue and no web."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.artifact import MODEL_NAME, Artifact, Form, Manifest, versions
from service.engine import Device, Engine, OpenEngine
from service.errors import ArtifactError, InferenceFailed


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

    def run(self, images: NDArray[np.uint8], threads: int = 1) -> NDArray[np.float32]:
        """Return logits (N, classes) for images (N, height, width, channels). Raises InferenceFailed at NaN and Inf."""
        logits = self.engine.run(images, threads)
        if not np.isfinite(logits).all():  # JSON has no NaN, and no label follows from one
            raise InferenceFailed(f"model {self.name} gave logits that are not finite")
        return logits


class Repository:
    """Finds and loads models below one folder."""

    def __init__(self, root: Path, open_engine: OpenEngine) -> None:
        self._root = root
        self._open_engine = open_engine

    def names(self) -> list[str]:
        """Return the models that have a version, by name. Raises ArtifactError where the folder holds none."""
        if not self._root.is_dir():
            raise ArtifactError(f"{self._root}: no such folder; name the model repository with --models")
        names = sorted(
            folder.name for folder in self._root.iterdir() if MODEL_NAME.fullmatch(folder.name) and versions(folder)
        )
        if not names:
            raise ArtifactError(
                f"{self._root} holds no model; expected {self._root}/<name>/<version>/model.onnx, "
                "as `foldserve export` writes it"
            )
        return names

    def load(self, name: str, device: Device, version: int | None = None) -> Model:
        """Load a model, by default its highest version, and check its golden images. Raises ArtifactError."""
        present = versions(self._root / name) if MODEL_NAME.fullmatch(name) else []
        if not present or (version is not None and version not in present):
            wanted = name if version is None else f"{name} version {version}"
            raise ArtifactError(f"{self._root} holds no model {wanted}; it has {', '.join(self.names())}")
        version = present[-1] if version is None else version
        artifact = Artifact.load(self._root / name / str(version))
        engine = self._open_engine(artifact.model_bytes, device)
        difference = _check(artifact, engine)
        return Model(name, version, artifact, engine, difference)


def _check(artifact: Artifact, engine: Engine) -> float:
    try:
        return artifact.golden.check(engine.run, artifact.manifest.preprocessing)
    except ArtifactError as error:
        raise ArtifactError(f"{artifact.path}: {error}") from None
