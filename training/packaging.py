"""A folded graph → models/<name>/<next version>/: manifest put in, golden images made, written whole or not at all.

The one place where an artifact is written; `export` and `importing` both end here.
"""

import contextlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from service.artifact import (
    GOLDEN_FILE,
    MANIFEST_KEY,
    MODEL_FILE,
    MODEL_NAME,
    Artifact,
    Golden,
    Manifest,
    Parity,
    versions,
)
from service.engine import Engine, choose_device, open_engine
from service.errors import ArtifactError
from service.preprocessing import Preprocessing, decode, encode_png
from training import card
from training.checkpoint import write_atomically
from training.errors import ExportRefused, UsageError
from training.parity import Reference

GOLDEN_IMAGES = 16
GOLDEN_ROOM = 4  # the golden tolerance is this many times the largest difference seen at export


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and what the checks saw."""

    folder: Path
    manifest: Manifest
    parity: Parity
    digest: str
    bytes: int


def check_name(name: str) -> None:
    """Raise UsageError for a name that cannot be a model's."""
    if not MODEL_NAME.fullmatch(name):
        raise UsageError(f"--name {name}: use letters, digits, dots, dashes and underscores, at most 100")


def package(
    models: Path, model: onnx.ModelProto, manifest: Manifest, images: NDArray[np.uint8], wanted: Reference
) -> Exported:
    """Write a folded float graph as the next version of `manifest.name`; the model gets the manifest as metadata.

    `images`, uint8 (N, height, width, channels), are those that `wanted` answers and that `manifest.parity` tells of.
    Raises ExportRefused or ArtifactError; then nothing was written.
    """
    assert manifest.parity is not None
    model.metadata_props.add(key=MANIFEST_KEY, value=manifest.model_dump_json())
    onnx.checker.check_model(model, full_check=True)
    golden = golden_of(images, wanted, manifest.parity, manifest.preprocessing)
    return write(models, manifest.name, manifest, model.SerializeToString(), golden)


def golden_of(images: NDArray[np.uint8], wanted: Reference, seen: Parity, spec: Preprocessing) -> Golden:
    """Take images spread over the checked ones, as PNG files, with the unfolded model's answers."""
    chosen = np.unique(np.linspace(0, len(images) - 1, GOLDEN_IMAGES).astype(int))
    encoded = tuple(encode_png(images[index]) for index in chosen)
    pixels = np.stack([decode(image, spec) for image in encoded])
    if not np.array_equal(pixels, images[chosen]):
        raise ExportRefused("decoding changed the pixels of a golden image; nothing was written")
    return Golden(encoded, pixels, wanted.logits[chosen], GOLDEN_ROOM * seen.max_abs_difference)


def write(models: Path, name: str, manifest: Manifest, model_bytes: bytes, golden: Golden) -> Exported:
    """Write a hidden folder, read it back as the service will, then rename it: whole or not at all."""
    parent = models / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    except OSError as error:
        raise ExportRefused(f"{parent} cannot be written: {error.strerror}") from None
    try:
        partial.chmod(0o755)  # a temporary folder is its maker's alone; a service may run as somebody else
        write_atomically(partial / MODEL_FILE, model_bytes)
        write_atomically(partial / GOLDEN_FILE, golden.to_bytes())
        artifact = Artifact.load(partial)
        _check_as_served(artifact, open_engine(artifact.model_bytes, choose_device("cpu")))
        folder = _next_version(parent)
        (partial / "README.md").write_text(card.model_card(manifest, artifact.digest, folder), encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        raise ExportRefused(f"{parent} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            parent.rmdir()  # only where nothing is in it
    assert manifest.parity is not None
    return Exported(folder, manifest, manifest.parity, artifact.digest, len(model_bytes))


def _check_as_served(artifact: Artifact, engine: Engine) -> None:
    try:
        artifact.golden.check(engine.run, artifact.manifest.preprocessing)
    except ArtifactError as error:
        raise ExportRefused(f"the artifact fails its own golden images: {error}; nothing was written") from None


def _next_version(parent: Path) -> Path:
    return parent / str(max(versions(parent), default=0) + 1)
