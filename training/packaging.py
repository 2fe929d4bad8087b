"""A folded graph → models/<name>/<next version>/: manifest put in, golden images made, written whole or not at all.

The one place where an artifact is written; `export` and `importing` both end here.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from service.artifact import EXACT_FILE, GOLDEN_FILE, MANIFEST_KEY, MODEL_FILE, MODEL_NAME, Artifact, versions
from service.engine import choose_device, open_engine
from service.errors import ArtifactError
from service.executions import float_twin
from service.golden import Golden
from service.manifest import Form, Manifest, Parity
from service.preprocessing import Preprocessing, decode, encode_decoded
from training import card
from training.checkpoint import write_atomically
from training.errors import ExportRefused, UsageError
from training.exact.convert import Material
from training.exact.forming import ExactForm, form_exact
from training.exact.options import ExactOptions
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
    exact_bytes: int = 0  # of the exact form, where there is one

    @property
    def summary(self) -> str:
        """What was written, in one line."""
        form = f", exact form {_size(self.exact_bytes)}" if self.exact_bytes else ""
        return f"wrote {self.folder} ({_size(self.bytes)}, sha256 {self.digest[:12]}…{form})"


def _size(count: int) -> str:
    """Return a file's size; the smallest models have some kilobytes."""
    return f"{count / 1e6:.2f} MB" if count >= 1e4 else f"{count / 1e3:.1f} kB"


def check_name(name: str) -> None:
    """Raise UsageError for a name that cannot be a model's."""
    if not MODEL_NAME.fullmatch(name):
        raise UsageError(f"--name {name}: use letters, digits, dots, dashes and underscores, at most 100")


def check_target(models: Path, name: str) -> None:
    """Say before the work, not after it, that no version of `name` could be written; touches nothing.

    Raises UsageError for a bad name, ExportRefused where this user cannot write, or the file system is read-only.
    """
    check_name(name)
    folder = models / name
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ExportRefused(f"{there} cannot be written by user {os.getuid()}; a version of {name} would go there")


def package(
    models: Path,
    model: onnx.ModelProto,
    manifest: Manifest,
    images: NDArray[np.uint8],
    wanted: Reference,
    *,
    exact: ExactOptions,
    material: Material | None,
    say: Callable[[str], None] = print,
) -> Exported:
    """Write a folded float graph as the next version of `manifest.name`; the model gets the manifest as metadata.

    `images`, uint8 (N, height, width, channels), are those that `wanted` answers and that `manifest.parity` tells of;
    `material` are those that an exact form is made with.
    Raises ExportRefused or ArtifactError; then nothing was written.
    """
    assert manifest.parity is not None
    model.metadata_props.add(key=MANIFEST_KEY, value=manifest.model_dump_json())
    onnx.checker.check_model(model, full_check=True)
    golden = golden_of(images, wanted, manifest.parity, manifest.preprocessing)
    form = form_exact(model, manifest, golden, material, exact, say)
    written = write(models, manifest, model.SerializeToString(), golden, form)
    if exact.float_twin is not None:
        _write_twin(exact.float_twin, form, say)
    return written


def _write_twin(path: Path, form: ExactForm | None, say: Callable[[str], None]) -> None:
    if form is None or form.twin is None:
        say(f"no float twin: there is no exact form to write to {path}")
        return
    try:
        write_atomically(path, form.twin)
    except OSError as error:
        raise ExportRefused(f"the model was written, its float twin was not: {path}: {error.strerror}") from None
    say(f"float twin: {path}")


def golden_of(images: NDArray[np.uint8], wanted: Reference, seen: Parity, spec: Preprocessing) -> Golden:
    """Take images spread over the checked ones, as PNG files that decode to them, with the unfolded model's answers."""
    chosen = np.unique(np.linspace(0, len(images) - 1, GOLDEN_IMAGES).astype(int))
    encoded = tuple(encode_decoded(images[index], spec) for index in chosen)
    pixels = np.stack([decode(image, spec) for image in encoded])
    if not np.array_equal(pixels, images[chosen]):
        raise ExportRefused("decoding changed the pixels of a golden image; nothing was written")
    return Golden(encoded, pixels, wanted.logits[chosen], GOLDEN_ROOM * seen.max_abs_difference)


def write(
    models: Path,
    manifest: Manifest,
    model_bytes: bytes,
    golden: Golden,
    form: ExactForm | None = None,
) -> Exported:
    """Write a hidden folder, read it back as the service will, then rename it: whole or not at all.

    Raises ExportRefused where the folder cannot be written or the artifact fails its own golden images.
    """
    parent = models / manifest.name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    except OSError as error:
        raise ExportRefused(f"{parent} cannot be written: {error.strerror}") from None
    try:
        partial.chmod(0o755)  # a temporary folder is its maker's alone; a service may run as somebody else
        write_atomically(partial / MODEL_FILE, model_bytes)
        write_atomically(partial / GOLDEN_FILE, (form.golden if form else golden).to_bytes())
        if form is not None:
            write_atomically(partial / EXACT_FILE, form.model_bytes)
        artifact = _read_back(partial, "float")
        described = _read_back(partial, "exact").manifest if form else manifest
        folder = _next_version(parent)
        (partial / "README.md").write_text(card.model_card(described, artifact.digest, folder), encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        raise ExportRefused(f"{parent} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            parent.rmdir()  # only where nothing is in it
    assert manifest.parity is not None
    size = len(form.model_bytes) if form else 0
    return Exported(folder, manifest, manifest.parity, artifact.digest, len(model_bytes), size)


def _read_back(folder: Path, form: Form) -> Artifact:
    """Read one form as the service will, and run its golden images; the exact one as its float twin."""
    artifact = Artifact.load(folder, form)
    content = artifact.model_bytes if form == "float" else _twin_of(artifact.model_bytes)
    try:
        engine = open_engine(content, choose_device("cpu"))
        artifact.golden.check(engine.run, artifact.manifest.preprocessing, form)
    except ArtifactError as error:
        raise ExportRefused(f"the artifact fails its own golden images: {error}; nothing was written") from None
    return artifact


def _twin_of(model_bytes: bytes) -> bytes:
    twin: bytes = float_twin(onnx.load_model_from_string(model_bytes)).SerializeToString()
    return twin


def _next_version(parent: Path) -> Path:
    return parent / str(max(versions(parent), default=0) + 1)
