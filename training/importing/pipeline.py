"""A foreign ONNX classifier → an artifact.

    read ─ inspect ─ interface ─ softmax off, batch open, pixels in ─ fold (float64) ─ prove ─ parity ─ package

The original in float64 is the measure; the folded graph is held against it, and the untouched file is too.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from service.artifact import MANIFEST_KEY, read_manifest
from service.engine import choose_device, open_engine
from service.errors import ArtifactError
from service.independence.proof import prove
from service.manifest import Manifest, NormRecord
from service.preprocessing import Preprocessing
from training import card, parity
from training.doctor.examine import examine
from training.doctor.norms import Subject
from training.doctor.read import onnx_subject
from training.doctor.text import as_text
from training.errors import ExportRefused, UsageError
from training.exact.convert import Material
from training.exact.options import ExactOptions
from training.folding.graph_constants import opset_of
from training.folding.graphs import fold_graph
from training.foreign.precision import in_float32
from training.foreign.read import load_onnx
from training.foreign.reference import Float64
from training.foreign.settling import settle
from training.importing.images import folder_images, folder_material, synthetic_images
from training.importing.interface import Interface, read_interface, refuse_huge, refuse_unknown, scales_itself
from training.importing.labels import read_labels
from training.importing.original import hold_against_original, inputs_for
from training.importing.preprocessing import Wishes, choose
from training.importing.rewrite import (
    copy_of,
    name_output,
    open_batch,
    with_entry,
    with_output_shapes,
    without_softmax,
)
from training.packaging import Exported, check_target, package

MEASURED = 2  # images on which each fold is measured, with every value of the graph held
MOST_FOR_BYTES = 0.02  # a std of 1/255 leaves pixels 0–255; ImageNet's are above 0.2
_OF_TORCH = "a checkpoint needs its network: `foldserve export PACKAGE.MODULE:FUNCTION --checkpoint FILE`"
_OF_KERAS = "write one with `model.export(FILE, format='onnx')`, or with tf2onnx"
OTHERS = dict.fromkeys((".pt", ".pth", ".safetensors"), _OF_TORCH) | dict.fromkeys(
    (".keras", ".h5", ".pb", ".tflite"), _OF_KERAS
)
MENDED_HERE = frozenset({"unfolded", "fixed-batch", "bias-before", "half-statistics"})


@dataclass(frozen=True, slots=True)
class Order:
    """What a person asks for: where from, under which name, with which labels, preprocessing and images."""

    path: Path
    name: str
    wishes: Wishes = field(default_factory=Wishes)
    labels: Path | None = None
    data: Path | None = None
    exact: ExactOptions = field(default_factory=ExactOptions)


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """A foreign classifier in float32 on its way to the contract.

    `original` is as it came; `core` has an open batch and `logits`, and takes what the original takes; `unfolded` is
    the core behind the entry, from pixels to logits.
    """

    original: onnx.ModelProto
    core: onnx.ModelProto
    unfolded: onnx.ModelProto
    interface: Interface
    spec: Preprocessing
    softmax: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """The images that the import is checked with, `kind` real or synthetic, and the original's answers to them."""

    images: NDArray[np.uint8]
    kind: str
    wanted: parity.Reference


def import_model(order: Order, models: Path, *, say: Callable[[str], None] = print) -> Exported:
    """Write the artifact of a foreign file as the next version of `order.name`.

    Raises FileRefused for what is no sound classifier, ExportRefused for what would answer wrongly, NotFoldable,
    UsageError or DataError; then nothing was written.
    """
    check_target(models, order.name)
    if order.path.is_dir():
        raise UsageError(f"{order.path} is a folder; name an ONNX file (`foldserve export` takes a run's folder)")
    if (instead := OTHERS.get(order.path.suffix.lower())) is not None:
        raise UsageError(f"{order.path} is not an ONNX file; {instead}")
    model = load_onnx(order.path)
    subject = onnx_subject(order.path, settle(model))
    own = _own_manifest(order.path, model, say)
    taken = take(model, order.wishes, say, own)
    warnings = _inspected(subject, say)
    labels = own.labels if own and not order.labels else read_labels(order.labels, taken.interface.classes)
    evidence = gather(taken, order.data, say)
    facts = _facts(order, model, taken, evidence, warnings)
    feeds = {taken.interface.input_name: inputs_for(evidence.images[:MEASURED], taken.interface, taken.spec)}
    folded = fold_graph(taken.core, feeds)  # before the entry is put in: its arithmetic is the contract's, and stays
    if folded.report.folds or folded.report.kept:
        say(card.fold_table(folded.report.folds, folded.report.kept))
    else:
        say("no BatchNorm is left in the file: there is nothing to fold")
    if folded.report.end_to_end is not None:
        say(card.fold_error_line(folded.report.end_to_end))
    manifest = _manifest(order.name, labels, taken, facts, subject)
    account = {"folds": folded.report.folds, "kept": folded.report.kept, "fold_error": folded.report.end_to_end}
    manifest = manifest.model_copy(update=account)
    if own is not None:
        pixels = own.pixels if own.preprocessing == taken.spec else None
        brought = {"folds": (*own.folds, *manifest.folds), "pixels": pixels, "licence": own.licence}
        manifest = manifest.model_copy(update=brought)
    model = with_entry(folded.model, taken.interface, taken.spec)
    wants_exact = order.data is not None and order.exact.wish != "off"
    material = folder_material(order.data, taken.spec, labels) if wants_exact and order.data else None
    return deliver(model, manifest, evidence, models, exact=order.exact, material=material, say=say)


def _own_manifest(path: Path, model: onnx.ModelProto, say: Callable[[str], None]) -> Manifest | None:
    """Return what a file says of its labels and pixels that is a model of foldserve already, or None."""
    if all(entry.key != MANIFEST_KEY for entry in model.metadata_props):
        return None
    try:
        own = read_manifest(path, path.read_bytes())
    except ArtifactError as error:
        say(f"warning  what the file says of itself is not believed: {error}")
        return None
    say("note     the file is a model of foldserve: what no flag says, labels and preprocessing, it says itself")
    return own


def take(model: onnx.ModelProto, wishes: Wishes, say: Callable[[str], None], own: Manifest | None = None) -> Taken:
    """Rewrite a foreign classifier to the contract, unfolded; the model itself is left alone.

    `own` is the manifest of one that kept the contract before.
    """
    refuse_unknown(model)
    original = in_float32(with_output_shapes(copy_of(model)))
    interface = read_interface(with_output_shapes(model))
    if not interface.takes_bytes and (scaling := scales_itself(original, interface)) is not None:
        wishes = _for_bytes(wishes, scaling, say)
    spec, notes = choose(wishes, interface.channels, interface.size, None if own is None else own.preprocessing)
    if interface.takes_bytes:
        spec, notes = _with_own_arithmetic(spec, wishes, own), ()
    for note in notes:
        say(f"note     {note}")
    core = settle(original)
    refuse_huge(core, interface, spec.size)
    softmax = without_softmax(core)
    if softmax:
        say(f"note     the final {softmax} is removed: the service answers with logits, and takes the softmax itself")
    if interface.batch is not None:
        say(f"note     the batch of {interface.batch} is made symbolic")
    open_batch(core, interface)
    name_output(core, interface)
    return Taken(original, core, with_entry(core, interface, spec), interface, spec, softmax)


def _with_own_arithmetic(spec: Preprocessing, wishes: Wishes, own: Manifest | None) -> Preprocessing:
    """Return how pixels are prepared for a graph that takes them as they are, whatever it does with them then.

    Raises UsageError for a mean or a deviation, which would be said of it and not be so.
    """
    if (wishes.mean, wishes.std) != (None, None):
        raise UsageError(
            "the model takes pixels 0–255 and does its own arithmetic: --mean and --std would change nothing; leave "
            "them out"
        )
    if own is not None:
        return spec.model_copy(update={"mean": own.preprocessing.mean, "std": own.preprocessing.std})
    return spec.model_copy(update={"mean": (0.0,) * spec.channels, "std": (1.0,) * spec.channels})


def _for_bytes(wishes: Wishes, scaling: str, say: Callable[[str], None]) -> Wishes:
    """Give pixels 0–255 to a graph that scales them itself, where nothing else is asked for."""
    said = f"the graph begins with {scaling}: it scales pixels 0–255 itself"
    if (wishes.preprocessing, wishes.mean, wishes.std) == (None, None, None):
        say(f"note     {said}, and is given them so (mean 0, std 1/255)")
        return replace(wishes, mean=(0.0,), std=(1 / 255,))
    if wishes.preprocessing is not None or min(wishes.std or (1.0,)) > MOST_FOR_BYTES:
        say(f"warning  {said}; what you ask for scales them first. If that is not meant, say --mean 0 --std 0.00392157")
    return wishes


def gather(taken: Taken, data: Path | None, say: Callable[[str], None]) -> Evidence:
    """Run the original over images, in float64 and in float32, and hold the untouched file against that."""
    if data is None:
        images, kind = synthetic_images(taken.spec), "synthetic"
        say("note     no --data: checked with made-up images; real ones are a better check")
    else:
        (images, _), kind = folder_images(data, taken.spec), card.REAL
    logits = Float64(taken.unfolded).run(images)
    if not np.isfinite(logits).all():
        raise ExportRefused("the original itself gives logits that are not finite; nothing was written")
    engine = open_engine(taken.unfolded.SerializeToString(), choose_device("cpu"))
    noise = np.abs(np.concatenate([engine.run(images[at : at + 8]) for at in range(0, len(images), 8)]) - logits).max()
    wanted = parity.Reference(logits, float(noise))
    say(hold_against_original(taken.original, taken.interface, taken.spec, images, wanted, softmax=taken.softmax))
    return Evidence(images, kind, wanted)


def deliver(
    model: onnx.ModelProto,
    manifest: Manifest,
    evidence: Evidence,
    models: Path,
    *,
    exact: ExactOptions,
    material: Material | None,
    say: Callable[[str], None] = print,
) -> Exported:
    """Prove a folded float graph from pixels to logits, hold it against the evidence, and write the artifact.

    Raises ExportRefused; then nothing was written.
    """
    verdict = prove(model)
    if verdict.verdict != "independent":
        raise ExportRefused(f"batch independence is {verdict.verdict}: {verdict.reason}; {verdict.remedy}")
    engine = open_engine(model.SerializeToString(), choose_device("cpu"))
    seen = parity.check(engine.run, evidence.images, evidence.wanted)
    say(card.parity_line(seen, evidence.kind))
    told = manifest.model_copy(update={"parity": seen})
    return package(models, model, told, evidence.images, evidence.wanted, exact=exact, material=material, say=say)


def _inspected(subject: Subject, say: Callable[[str], None]) -> tuple[str, ...]:
    """Show what the doctor finds. Raises ExportRefused for its errors."""
    report = examine(subject)
    left = tuple(finding for finding in report.findings if finding.check not in MENDED_HERE)
    if report.errors:
        say(as_text(report))
        words = "; ".join(f"{finding.title} ({finding.observed})" for finding in report.errors)
        raise ExportRefused(f"{subject.path} would answer wrongly: {words}; nothing was written")
    for finding in left:
        say(f"{finding.severity:8} {finding.title} [{finding.check}]: {finding.observed}")
    return tuple(f"{finding.check}: {finding.observed}" for finding in left)


def _manifest(name: str, labels: tuple[str, ...], taken: Taken, facts: dict[str, Any], subject: Subject) -> Manifest:
    records = [
        NormRecord(norm=one.name, eps=one.eps, momentum=None, num_batches_tracked=None, initial_share=None)
        for one in subject.layers
    ]
    return Manifest(
        name=name, labels=labels, preprocessing=taken.spec, batchnorm=tuple(records), training=facts, licence=None
    )


def _facts(
    order: Order, model: onnx.ModelProto, taken: Taken, evidence: Evidence, warnings: tuple[str, ...]
) -> dict[str, Any]:
    content = order.path.read_bytes()
    packages = ("foldserve", "onnx", "onnxruntime")
    return {
        "source": order.path.name,
        "source_sha256": hashlib.sha256(content).hexdigest(),
        "producer": f"{model.producer_name or 'unknown'} {model.producer_version}".strip(),
        "opset": opset_of(model),
        "removed": taken.softmax,
        "images": evidence.kind,
        "warnings": list(warnings),
        "versions": {name: version(name) for name in packages if _is_installed(name)},
        "date": datetime.now(UTC).date().isoformat(),
    }


def _is_installed(package_name: str) -> bool:
    try:
        return bool(version(package_name))
    except ModuleNotFoundError:  # onnxruntime is called onnxruntime-gpu on some machines
        return False
