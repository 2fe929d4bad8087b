"""A finished run → models/<name>/<next version>/: folded, converted, checked, and only then written.

    best checkpoint ─ fold (float64) ─ verify each fold ─ ONNX ─ parity at four batch sizes ─ golden images ─ folder
                                                             └ exact form ─ proved, and held against its integers ┘

The unfolded network in float64 is the measure of everything.
"""

import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.artifact import INPUT_NAME, OUTPUT_NAME
from service.engine import choose_device, open_engine
from service.manifest import Manifest
from training import card, parity
from training.data import Split
from training.errors import ExportRefused
from training.exact.convert import Labelled, Material
from training.exact.options import ExactOptions
from training.folding.modules import fold, verify
from training.foreign.settling import settle
from training.loop import Normalize
from training.normalization import norm_records
from training.packaging import Exported, check_target, package
from training.run import Trained

OPSET = 20
VERIFIED_IMAGES = 256


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
    check_target(models, name)
    manifest, images = _manifest(trained, name), real_images(trained)
    return export_network(trained.network, manifest, images, models, exact=exact, material=_material(trained), say=say)


def export_network(
    network: nn.Module,
    manifest: Manifest,
    images: NDArray[np.uint8],
    models: Path,
    *,
    exact: ExactOptions,
    material: Material | None,
    say: Callable[[str], None] = print,
) -> Exported:
    """Fold a network in evaluation mode, convert it, hold it against `images` and write the artifact.

    `manifest` tells all but the folds and the parity. Images uint8 (N, height, width, channels).
    Raises NotFoldable or ExportRefused; then nothing was written.
    """
    spec = manifest.preprocessing
    normalize = Normalize(spec.mean, spec.std)
    standardised = normalize(torch.from_numpy(images[:VERIFIED_IMAGES]).permute(0, 3, 1, 2))
    folded = verify(fold(network, standardised), standardised)
    say(card.fold_table(folded.folds, folded.kept))
    if folded.end_to_end is not None:
        say(card.fold_error_line(folded.end_to_end))
    wanted = parity.reference(Classifier(normalize, folded.unfolded), images)
    model = to_onnx(Classifier(normalize, folded.module), example=images[:2])
    engine = open_engine(model.SerializeToString(), choose_device("cpu"))
    seen = parity.check(engine.run, images, wanted)
    say(card.parity_line(seen, manifest.training.get("images", card.REAL)))
    found: dict[str, Any] = {
        "folds": folded.folds,
        "kept": folded.kept,
        "fold_error": folded.end_to_end,
        "parity": seen,
    }
    return package(
        models, model, manifest.model_copy(update=found), images, wanted, exact=exact, material=material, say=say
    )


def _material(trained: Trained) -> Material:
    """Return training images to calibrate and fine-tune with, and the validation images to judge by."""
    training, validation = trained.dataset.training, trained.dataset.validation
    return Material(training.images, _labelled(validation), _labelled(training))


def _labelled(split: Split) -> Labelled:
    return Labelled(split.images, split.targets.astype(np.int64))


def real_images(trained: Trained) -> NDArray[np.uint8]:
    """Return ENOUGH_IMAGES images of the data set or all, test images first, uint8 (N, height, width, channels).

    Raises ExportRefused where there are fewer than FEWEST_IMAGES.
    """
    parts = (trained.dataset.test, trained.dataset.validation, trained.dataset.training)
    chosen = [part.images[: parity.ENOUGH_IMAGES] for part in parts]  # files are decoded here, so only what is needed
    images: NDArray[np.uint8] = np.concatenate(chosen)[: parity.ENOUGH_IMAGES]
    if len(images) < parity.FEWEST_IMAGES:
        raise ExportRefused(
            f"the check needs {parity.FEWEST_IMAGES} real images, the data set has {len(images)}; add some, and train "
            "anew"
        )
    return images


def to_onnx(classifier: nn.Module, example: NDArray[np.uint8]) -> onnx.ModelProto:
    """Convert a classifier in evaluation mode to ONNX in float32, with a symbolic batch.

    `example` has at least two images: a batch of one would be taken for a constant. Where BatchNorm is left that the
    exporter's optimizer would fold, by rules that have shipped wrong models (pytorch#169178), it is not used: what is
    recorded as kept is in the file. Constants are worked out then too, for the proof and the folding need them.
    """
    with quiet():
        program = torch.onnx.export(
            classifier.float().eval(),
            (torch.from_numpy(example),),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            external_data=False,
            verbose=False,
        )
        assert program is not None
        plain = program.model_proto
        program.optimize()
        optimized = program.model_proto
    return _without_traces(optimized if _norms(optimized) == _norms(plain) else settle(plain))


def _norms(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "BatchNormalization" for node in model.graph.node)


@contextmanager
def quiet() -> Any:
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


def _manifest(trained: Trained, name: str) -> Manifest:
    spec = trained.dataset.preprocessing.model_copy(update={"mean": trained.pixels.mean, "std": trained.pixels.std})
    return Manifest(
        name=name,
        labels=trained.dataset.labels,
        preprocessing=spec,
        batchnorm=norm_records(trained.network, trained.statistics),
        pixels=trained.pixels,
        training=trained.result,
        licence=f"data: {trained.dataset.licence}",
    )
