"""A finished run → models/<name>/<next version>/: folded, converted, checked, and only then written.

    best checkpoint ─ fold (float64) ─ verify each fold ─ ONNX ─ parity at four batch sizes ─ golden images ─ folder
                                                             └ exact form ─ proved, and held against its integers ┘

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
    EXACT_FILE,
    GOLDEN_FILE,
    INPUT_NAME,
    MANIFEST_KEY,
    MODEL_FILE,
    MODEL_NAME,
    OUTPUT_NAME,
    Artifact,
    Form,
    Golden,
    Manifest,
    Parity,
    versions,
)
from service.engine import choose_device, open_engine
from service.errors import ArtifactError
from service.executions import float_twin
from service.preprocessing import Preprocessing, decode, encode_png
from training import card, parity
from training.checkpoint import write_atomically
from training.data import Split
from training.errors import ExportRefused, UsageError
from training.exact.convert import Labelled, Material
from training.exact.forming import ExactForm, ExactOptions, form_exact
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
    exact_bytes: int = 0  # of the exact form, where there is one


class Classifier(nn.Module):
    """uint8 pixels (N, height, width, channels) → logits (N, classes): the whole of what is served."""

    def __init__(self, normalize: Normalize, network: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Transpose while the pixels are bytes, which moves a quarter of what floats would.

        `contiguous` costs no node; without it the exporter traces the strides of channels that lie last, and writes an
        adaptive pooling as a Gather over all positions.
        """
        standardised = self.normalize(image.permute(0, 3, 1, 2)).contiguous()  # (N, H, W, C) → (N, C, H, W)
        logits: Tensor = self.network(standardised)
        return logits


def export(
    trained: Trained,
    models: Path,
    name: str,
    *,
    exact: ExactOptions = ExactOptions(),  # noqa: B008 - frozen
    say: Callable[[str], None] = print,
) -> Exported:
    """Write the artifact of a run as the next version of `name`, with its exact form where that is asked for.

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
    form = form_exact(model, manifest, golden, _material(trained), exact, say)
    return write_artifact(models, name, manifest, model.SerializeToString(), golden, form)


def _material(trained: Trained) -> Material:
    """Return training images to calibrate and fine-tune with, and the validation images to judge by."""
    training, validation = trained.dataset.training, trained.dataset.validation
    return Material(training.images, _labelled(validation), _labelled(training))


def _labelled(split: Split) -> Labelled:
    return Labelled(split.images, split.targets.astype(np.int64))


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


def write_artifact(
    models: Path,
    name: str,
    manifest: Manifest,
    model_bytes: bytes,
    golden: Golden,
    form: ExactForm | None,
) -> Exported:
    """Write a hidden folder, read it back as the service will, then rename it: whole or not at all.

    Raises ExportRefused where the folder cannot be written or the artifact fails its own golden images.
    """
    parent = models / name
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
    return Exported(folder, described, manifest.parity, artifact.digest, len(model_bytes), size)


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
