"""A finished run → models/<name>/<next version>/: folded, converted, checked, and only then written.

    best checkpoint ─ fold (float64) ─ verify each fold ─ ONNX ─ parity at four batch sizes ─ golden images ─ folder

The unfolded network in float64 is the measure of everything.
"""

import contextlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.artifact import (
    GOLDEN_FILE,
    INPUT_NAME,
    MANIFEST_KEY,
    MODEL_FILE,
    MODEL_NAME,
    OUTPUT_NAME,
    Artifact,
    Golden,
    Manifest,
    Parity,
    versions,
)
from service.engine import Engine, choose_device, open_engine
from service.errors import ArtifactError
from service.preprocessing import Preprocessing, decode, encode_png
from training import card, parity
from training.checkpoint import write_atomically
from training.errors import ExportRefused, UsageError
from training.folding.modules import Folded, fold, verify
from training.loop import Normalize
from training.normalization import norm_records
from training.run import Trained

OPSET = 20
GOLDEN_IMAGES = 16
GOLDEN_ROOM = 4  # the golden tolerance is this many times the largest difference seen at export
VERIFIED_IMAGES = 256


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and what the checks saw."""

    folder: Path
    manifest: Manifest
    parity: Parity
    digest: str
    bytes: int


class Classifier(nn.Module):
    """uint8 pixels (N, height, width, channels) → logits (N, classes): the whole of what is served."""

    def __init__(self, normalize: Normalize, network: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Transpose while the pixels are bytes, which moves a quarter of what floats would."""
        logits: Tensor = self.network(self.normalize(image.permute(0, 3, 1, 2)))  # (N, H, W, C) → (N, C, H, W)
        return logits


def export(trained: Trained, models: Path, name: str, *, say: Callable[[str], None] = print) -> Exported:
    """Write the artifact of a run as the next version of `name`.

    Raises UsageError for a bad name, NotFoldable, or ExportRefused; then nothing was written.
    """
    check_name(name)
    images = real_images(trained)
    folded = _fold(trained, images)
    say(card.fold_table(folded.folds, folded.kept))
    if folded.end_to_end is not None:
        say(card.fold_error_line(folded.end_to_end))
    normalize = Normalize(trained.pixels.mean, trained.pixels.std)
    wanted = parity.reference(Classifier(normalize, folded.unfolded), images)
    model = to_onnx(Classifier(normalize, folded.module), example=images[:2])
    engine = open_engine(model.SerializeToString(), choose_device("cpu"))
    seen = parity.check(engine.run, images, wanted)
    say(card.parity_line(seen))
    manifest = _manifest(trained, name, folded, seen)
    model.metadata_props.add(key=MANIFEST_KEY, value=manifest.model_dump_json())
    onnx.checker.check_model(model, full_check=True)
    golden = _golden(images, wanted, seen, manifest.preprocessing)
    return _write(models, name, manifest, model.SerializeToString(), golden)


def check_name(name: str) -> None:
    """Raise UsageError for a name that cannot be a model's."""
    if not MODEL_NAME.fullmatch(name):
        raise UsageError(f"--name {name}: use letters, digits, dots, dashes and underscores, at most 100")


def real_images(trained: Trained) -> NDArray[np.uint8]:
    """Return at least FEWEST_IMAGES images of the data set, test images first, uint8 (N, height, width, channels)."""
    parts = (trained.dataset.test, trained.dataset.validation, trained.dataset.training)
    chosen = [part.images[: parity.FEWEST_IMAGES] for part in parts]  # files are decoded here, so only what is needed
    images: NDArray[np.uint8] = np.concatenate(chosen)[: parity.FEWEST_IMAGES]
    if len(images) < parity.FEWEST_IMAGES:
        raise ExportRefused(f"the check needs {parity.FEWEST_IMAGES} real images, the data set has {len(images)}")
    return images


def to_onnx(classifier: nn.Module, example: NDArray[np.uint8]) -> onnx.ModelProto:
    """Convert a classifier in evaluation mode to ONNX in float32, with a symbolic batch.

    `example` has at least two images: a batch of one would be taken for a constant. No BatchNorm that could fold is
    left, so the exporter's own folding, which has shipped wrong models (pytorch#169178), finds nothing to do.
    """
    with _quiet():
        program = torch.onnx.export(
            classifier.float().eval(),
            (torch.from_numpy(example),),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return _without_traces(program.model_proto)


@contextmanager
def _quiet() -> Any:
    """Keep the exporter's own chatter, which concerns its authors, off the terminal."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the exporter's notes on nodes and values: source paths and stack traces of the exporting machine."""
    for group in (
        model.graph.node,
        model.graph.value_info,
        model.graph.input,
        model.graph.output,
        model.graph.initializer,
    ):
        for entry in group:
            del entry.metadata_props[:]
            entry.doc_string = ""
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    return model


def _fold(trained: Trained, images: NDArray[np.uint8]) -> Folded:
    normalize = Normalize(trained.pixels.mean, trained.pixels.std)
    standardised = normalize(torch.from_numpy(images[:VERIFIED_IMAGES]).permute(0, 3, 1, 2))
    return verify(fold(trained.network, standardised), standardised)


def _manifest(trained: Trained, name: str, folded: Folded, seen: Parity) -> Manifest:
    spec = trained.dataset.preprocessing.model_copy(update={"mean": trained.pixels.mean, "std": trained.pixels.std})
    return Manifest(
        name=name,
        labels=trained.dataset.labels,
        preprocessing=spec,
        folds=folded.folds,
        kept=folded.kept,
        fold_error=folded.end_to_end,
        batchnorm=norm_records(trained.network, trained.statistics),
        parity=seen,
        pixels=trained.pixels,
        training=trained.result,
        licence=f"data: {trained.dataset.licence}",
    )


def _golden(images: NDArray[np.uint8], wanted: parity.Reference, seen: Parity, spec: Preprocessing) -> Golden:
    """Take images spread over the checked ones, as PNG files, with the unfolded model's answers."""
    chosen = np.linspace(0, len(images) - 1, GOLDEN_IMAGES).astype(int)
    encoded = tuple(encode_png(images[index]) for index in chosen)
    pixels = np.stack([decode(image, spec) for image in encoded])
    if not np.array_equal(pixels, images[chosen]):
        raise ExportRefused("decoding changed the pixels of a golden image; nothing was written")
    return Golden(encoded, pixels, wanted.logits[chosen], GOLDEN_ROOM * seen.max_abs_difference)


def _write(models: Path, name: str, manifest: Manifest, model_bytes: bytes, golden: Golden) -> Exported:
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
