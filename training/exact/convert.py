"""A folded float artifact → its exact form: calibrated, written, proved, and held against the float form.

read ─ calibrate ─ grids ─ write ─ prove ─ agree? ─ (equalize and compare) ─ (fine-tune) ─ executions = integers
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from service.errors import NotExact
from service.independence.exactness import THEOREM_VERSION, Exactness, prove_exact
from service.integers import Steps, read_steps
from service.manifest import ExactLayer, ExactRecord
from training.errors import NotConvertible
from training.exact.calibration import FEWEST_IMAGES, Observed, calibrate
from training.exact.checking import Labelled, Logits, Report, accuracy, check_executions, logits_of, open_model
from training.exact.equalizing import equalize
from training.exact.finetuning import fine_tune
from training.exact.grids import choose_grids
from training.exact.network import Network
from training.exact.reading import read_network
from training.exact.settling import settle_tables
from training.exact.writing import write_exact

WORTH_A_FINE_TUNE = 0.1  # points of accuracy
MOST_CALIBRATION = 512
MOST_PIXELS = 64 * 224 * 224  # of a calibration: for ResNet-50 so many already take 136 s of a conversion's 233 s


@dataclass(frozen=True, slots=True)
class Material:
    """Images to convert with: `calibration` (N, H, W, C), no labels; `validation` to judge; `training` to fine-tune."""

    calibration: NDArray[np.uint8]
    validation: Labelled | None = None
    training: Labelled | None = None


@dataclass(frozen=True, slots=True)
class Converted:
    """An exact model, what was proved of it, and the account that goes into its manifest."""

    model: onnx.ModelProto
    steps: Steps
    exactness: Exactness
    record: ExactRecord


@dataclass(frozen=True, slots=True)
class _Draft:
    """One try: the network it was made of, the model, and its logits on the calibration images."""

    network: Network
    model: onnx.ModelProto
    bits: Mapping[str, int]
    logits: Logits
    error: float  # mean squared difference to the float logits
    is_equalized: bool


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The draft that is kept, the epochs of fine-tuning in it, and its accuracy where images to judge by are given."""

    draft: _Draft
    epochs: int = 0
    accuracy: float | None = None


def convert(float_model: onnx.ModelProto, material: Material, report: Report = lambda *_: None) -> Converted:
    """Return the exact form of a folded artifact (uint8 `image` in, float32 `logits` out).

    Raises NotConvertible, with the node or layer and the reason, where there is none; ExportRefused where this
    machine's kernels do not compute the integers.
    """
    _check_images(float_model, material)
    images = _calibration_images(material)
    network = read_network(float_model)
    wanted = logits_of(open_model(float_model), images)
    float_accuracy = None if material.validation is None else _accuracy(float_model, material.validation)
    chosen = _fine_tuned(_best(network, images, wanted, report), float_accuracy, material, wanted, report)
    draft = chosen.draft
    steps, exactness = _proved(draft.model)
    checked, differing = check_executions(draft.model, steps, _for_checks(material), report)
    record = ExactRecord(
        theorem=THEOREM_VERSION,
        layers=_layers(exactness, draft.bits),
        calibration_images=len(images),
        is_equalized=draft.is_equalized,
        fine_tuned_epochs=chosen.epochs,
        agreement=float((draft.logits.argmax(1) == wanted.argmax(1)).mean()),
        checked_images=checked,
        differing_executions=tuple(differing),
        validation_images=0 if material.validation is None else len(material.validation.images),
        accuracy=chosen.accuracy,
        float_accuracy=float_accuracy,
    )
    return Converted(draft.model, steps, exactness, record)


def _proved(model: onnx.ModelProto) -> tuple[Steps, Exactness]:
    try:
        steps = read_steps(model)
        return steps, prove_exact(steps)
    except NotExact as error:
        raise NotConvertible(str(error)) from None


def _calibration_images(material: Material) -> NDArray[np.uint8]:
    """Return the first images of the calibration set, fewer of large ones, so that its cost is bounded."""
    pixels = int(np.prod(material.calibration.shape[1:3]))
    most = min(MOST_CALIBRATION, max(FEWEST_IMAGES, MOST_PIXELS // max(1, pixels)))
    return material.calibration[:most]


def _check_images(float_model: onnx.ModelProto, material: Material) -> None:
    if len(material.calibration) < FEWEST_IMAGES:
        raise NotConvertible(
            f"calibration needs at least {FEWEST_IMAGES} real images, of the kind that will be served; "
            f"got {len(material.calibration)}"
        )
    wanted = tuple(side.dim_value for side in float_model.graph.input[0].type.tensor_type.shape.dim[1:])
    labelled = [one.images for one in (material.validation, material.training) if one is not None]
    for images in (material.calibration, *labelled):
        if images.shape[1:] != wanted:
            raise NotConvertible(
                f"images to convert with are {_shape(images.shape[1:])}, the network takes {_shape(wanted)} "
                "(height × width × channels); prepare them as the model's preprocessing does"
            )


def _shape(sides: tuple[int, ...]) -> str:
    return " × ".join(str(side) for side in sides)


def _best(network: Network, images: NDArray[np.uint8], wanted: Logits, report: Report) -> _Draft:
    """Return the better of two drafts, with and without equalization, by the error of the logits."""
    observed = calibrate(network, images, report)
    plain = _draft(network, observed, images, wanted)
    evened, pairs = equalize(network, observed)
    if not pairs:
        return plain
    equalized = _draft(evened, calibrate(evened, images, report), images, wanted, is_equalized=True)
    return min((plain, equalized), key=lambda draft: draft.error)


def _draft(
    network: Network,
    observed: Mapping[str, Observed],
    images: NDArray[np.uint8],
    wanted: Logits,
    *,
    is_equalized: bool = False,
) -> _Draft:
    grids = settle_tables(network, choose_grids(network, observed))
    model, bits = write_exact(network, grids, observed)
    logits = logits_of(open_model(model), images)
    error = float(((logits - wanted) ** 2).mean())
    return _Draft(network, model, bits, logits, error, is_equalized)


def _fine_tuned(
    draft: _Draft, float_accuracy: float | None, material: Material, wanted: Logits, report: Report
) -> _Chosen:
    """Return a draft whose weights were trained with the rounding in place, where the drop asks for it and it helps."""
    validation, training = material.validation, material.training
    if validation is None or float_accuracy is None:
        return _Chosen(draft)
    most, goal = _accuracy(draft.model, validation), float_accuracy - WORTH_A_FINE_TUNE / 100
    best = _Chosen(draft, 0, most)
    if training is None or most >= goal:
        return best
    images = _calibration_images(material)
    grids = settle_tables(draft.network, choose_grids(draft.network, calibrate(draft.network, images)))
    for epoch, network in enumerate(fine_tune(draft.network, grids, training, report), start=1):
        made = _draft(network, calibrate(network, images), images, wanted, is_equalized=draft.is_equalized)
        reached = _accuracy(made.model, validation)
        if reached > most:
            best, most = _Chosen(made, epoch, reached), reached
        if most >= goal:
            break
    return best


def _accuracy(model: onnx.ModelProto, labelled: Labelled) -> float:
    return accuracy(logits_of(open_model(model), labelled.images), labelled)


def _for_checks(material: Material) -> NDArray[np.uint8]:
    more = [material.validation.images] if material.validation is not None else []
    return np.concatenate([*more, material.calibration])


def _layers(exactness: Exactness, bits: Mapping[str, int]) -> tuple[ExactLayer, ...]:
    return tuple(
        ExactLayer(
            name=layer.name,
            weight_bits=bits.get(layer.name, 8),
            terms=layer.terms,
            bound=layer.bound,
            headroom_bits=round(layer.headroom_bits, 2),
        )
        for layer in exactness.layers
    )


__all__ = ["Converted", "Labelled", "Material", "convert"]
