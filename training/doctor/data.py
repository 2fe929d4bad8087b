"""What images show about running statistics: drift per layer, wrong preprocessing, accuracy by batch statistics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from service.preprocessing import Preprocessing
from training.doctor.examine import by_severity
from training.doctor.findings import Finding, Report, finding
from training.doctor.graph import norm_nodes
from training.doctor.norms import Layer, Subject
from training.doctor.repair import Statistics, population, up_to
from training.errors import UsageError
from training.folding.evaluation import OPERATORS, BatchNormalization
from training.foreign.precision import in_float32
from training.foreign.reference import CHUNK
from training.importing.images import CHECKED, folder_images
from training.importing.interface import Interface, read_interface, refuse_huge
from training.importing.original import inputs_for
from training.importing.preprocessing import Wishes, choose
from training.importing.published import IMAGENET_MEAN, IMAGENET_STD
from training.importing.rewrite import copy_of, open_batch, with_output_shapes

WORST = 40  # channels of a layer that are kept for the picture
FAR_MEAN, FAR_VARIANCE = 1.0, np.log(4)  # a whole deviation, or a variance four times as large
FAR_SHARE = 0.25  # of a layer's channels: single ones drift with any few images
BETTER = 2.0  # how much closer another preprocessing must bring the first BatchNorm
BATCH = 32  # images that normalise each other where accuracy by batch statistics is asked for
GAIN = 0.05  # accuracy that batch statistics must gain; a few hundred images settle no less
ORDERS = ("RGB", "BGR")
SCALINGS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "pixels 0–1 (--mean 0 --std 1)": ((0.0,), (1.0,)),
    "pixels 0–255 (--mean 0 --std 0.00392157)": ((0.0,), (1 / 255,)),
    "pixels −1–1 (--mean 0.5 --std 0.5)": ((0.5,), (0.5,)),
    "ImageNet's mean and deviation": (IMAGENET_MEAN, IMAGENET_STD),
}


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """A graph in float32 with an open batch, and the images that run through it; `classes` are their folders."""

    model: onnx.ModelProto
    interface: Interface
    spec: Preprocessing
    images: NDArray[np.uint8]
    classes: tuple[str, ...]


def examine_data(report: Report, subject: Subject, folder: Path, wishes: Wishes) -> Report:
    """Add to a report what up to 64 images of a folder show. Raises UsageError for a file without a graph."""
    if subject.model is None or not norm_nodes(subject.model.graph):
        raise UsageError(f"--data needs a graph with BatchNorm in it; {subject.path} has none")
    calibration = _calibrate(subject.model, folder, wishes)
    drift = _drift(calibration, subject.layers)
    other = _fits_better(calibration, subject.layers[0])
    scores = _accuracy(calibration)
    findings = [*report.findings, *_judged(drift, other, scores)]
    data: dict[str, Any] = {"images": len(calibration.images), "drift": drift}
    data |= {"accuracy": scores} if scores else {}
    return replace(report, findings=by_severity(findings), data=data)


def _calibrate(model: onnx.ModelProto, folder: Path, wishes: Wishes) -> Calibration:
    opened = in_float32(with_output_shapes(copy_of(model)))
    interface = read_interface(opened)
    spec, _ = choose(wishes, interface.channels, interface.size)
    refuse_huge(opened, interface, spec.size)
    images, classes = folder_images(folder, spec, CHECKED)
    open_batch(opened, interface)
    return Calibration(opened, interface, spec, images, tuple(classes))


def _judged(drift: list[dict[str, Any]], other: str | None, scores: dict[str, float] | None) -> Iterator[Finding]:
    if other:
        yield finding("preprocessing", other)
    far = [one["layer"] for one in drift if one["far"] > FAR_SHARE]
    if far:
        worst = drift[0]
        observed = f"{worst['far']:.0%} of the channels of {worst['layer']} are far off"
        yield finding("drift", observed, far)
    if scores and scores["batch"] - scores["running"] > GAIN:
        observed = f"{scores['running']:.1%} by running statistics, {scores['batch']:.1%} by those of the batch"
        yield finding("accuracy", observed)


def _drift(calibration: Calibration, layers: tuple[Layer, ...]) -> list[dict[str, Any]]:
    """Return for each layer how far its channels are, worst layer and worst channels first.

    mean: |running − data| in deviations of the data; variance: |ln(running / data)|.
    """
    inputs = inputs_for(calibration.images, calibration.interface, calibration.spec)
    nodes = {node.name or node.output[0]: node for node in norm_nodes(calibration.model.graph)}
    found = []
    for layer in layers:
        if layer.name in nodes and layer.running_mean is not None and layer.running_var is not None:
            seen = population(up_to(calibration.model, nodes[layer.name].input[0]), inputs)
            found.append(_layer_drift(layer, *_distances(layer, seen)))
    return sorted(found, key=lambda one: -float(one["far"]))


def _distances(layer: Layer, seen: Statistics) -> Statistics:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, var = seen[0], seen[1] + layer.eps
    with np.errstate(invalid="ignore"):  # a negative running variance is a finding of its own
        return np.abs(layer.running_mean - mean) / np.sqrt(var), np.abs(np.log((layer.running_var + layer.eps) / var))


def _layer_drift(layer: Layer, means: NDArray[np.float64], variances: NDArray[np.float64]) -> dict[str, Any]:
    means, variances = np.nan_to_num(means, nan=1e9), np.nan_to_num(variances, nan=1e9)
    far = (means > FAR_MEAN) | (variances > FAR_VARIANCE)
    worst = np.argsort(-np.maximum(means / FAR_MEAN, variances / FAR_VARIANCE))[:WORST]
    channels = [{"channel": int(at), "mean": float(means[at]), "variance": float(variances[at])} for at in worst]
    return {"layer": layer.name, "far": float(far.mean()), "channels": channels}


def _fits_better(calibration: Calibration, first: Layer) -> str | None:
    """Try the usual scalings and both orders of colours on the first BatchNorm; return the one that fits far better."""
    node = norm_nodes(calibration.model.graph)[0]
    if calibration.interface.takes_bytes or first.running_mean is None or first.running_var is None:
        return None
    part = up_to(calibration.model, node.input[0])

    def distance(spec: Preprocessing, images: NDArray[np.uint8]) -> float:
        means, variances = _distances(first, population(part, inputs_for(images, calibration.interface, spec)))
        return float(np.median(means) + np.median(variances))

    now = distance(calibration.spec, calibration.images)
    tried = {}
    for (name, (mean, std)), order in product(SCALINGS.items(), ORDERS[: calibration.interface.channels]):
        spec = _scaled(calibration.spec, mean, std)
        if spec is not None:
            images = calibration.images if order == "RGB" else calibration.images[..., ::-1]
            tried[f"{name}, {order}"] = distance(spec, images)
    tried |= _given_in_bgr(calibration, distance)
    best = min(tried, key=lambda name: tried[name])
    if tried[best] * BETTER >= now or now < FAR_MEAN / 4:  # near enough as it is
        return None
    return f"{best}: distance {tried[best]:.2g} instead of {now:.2g} (median over channels of both drifts)"


def _given_in_bgr(calibration: Calibration, distance: Any) -> dict[str, float]:
    if calibration.interface.channels == 1:
        return {}
    return {"the given scaling, BGR": distance(calibration.spec, calibration.images[..., ::-1])}


def _scaled(spec: Preprocessing, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing | None:
    if len(mean) > spec.channels:
        return None
    times = spec.channels // len(mean)
    return spec.model_copy(update={"mean": mean * times, "std": std * times})


def targets_of(classes: Sequence[str], count: int) -> NDArray[np.int64] | None:
    """Return each image's class by its folder's place in sorted order, None where there are not `count` folders."""
    names = sorted(set(classes))
    return None if len(names) != count else np.array([names.index(name) for name in classes], np.int64)


def _accuracy(calibration: Calibration) -> dict[str, float] | None:
    """Return accuracy by running and by batch statistics, where the folders are the classes in sorted order."""
    targets = targets_of(calibration.classes, calibration.interface.classes)
    if targets is None:
        return None
    shuffled = np.random.default_rng(0).permutation(len(targets))  # a batch of one class has no fair statistics
    inputs = inputs_for(calibration.images, calibration.interface, calibration.spec)[shuffled]
    found = {}
    rest = [one for one in OPERATORS if one is not BatchNormalization]
    for name, norm, together in (("running", BatchNormalization, CHUNK), ("batch", ByBatch, BATCH)):
        evaluator = ReferenceEvaluator(calibration.model, new_ops=[norm, *rest])
        answers: list[Any] = [
            evaluator.run(None, {calibration.interface.input_name: inputs[at : at + together]})
            for at in range(0, len(inputs), together)
        ]
        scores = np.concatenate([answer[0] for answer in answers]).reshape(len(targets), -1)
        found[name] = float((scores.argmax(1) == targets[shuffled]).mean())
    return found


class ByBatch(BatchNormalization):
    """BatchNormalization by the statistics of the batch, whatever the file holds."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, bias: Any, mean: Any, var: Any, **given: Any) -> tuple[NDArray[Any]]:
        axes = (0, *range(2, x.ndim))
        return super()._run(x, scale, bias, x.mean(axes).reshape(mean.shape), x.var(axes).reshape(var.shape), **given)


ByBatch.__name__ = "BatchNormalization"  # the evaluator finds a node's class by this name
