"""`foldserve repair`: reads a file, mends it, writes another, and shows before and after."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save

from service.wording import counted
from training.checkpoint import write_atomically
from training.doctor.attaching import Source, attach
from training.doctor.checkpoints import REPAIRED_KEY, read_state
from training.doctor.data import targets_of
from training.doctor.graph import norm_nodes, training_norms
from training.doctor.norms import Subject
from training.doctor.read import read_subject
from training.doctor.repair import (
    Mended,
    accuracy,
    beside,
    estimate,
    keep_old,
    mend_graph,
    with_updates,
    without_initial_share,
)
from training.doctor.text import named
from training.errors import FileRefused, UsageError
from training.foreign.precision import in_float32
from training.foreign.read import load_onnx
from training.importing.images import CALIBRATION, folder_images
from training.importing.interface import read_interface, refuse_huge
from training.importing.original import inputs_for
from training.importing.preprocessing import Wishes, choose
from training.importing.rewrite import copy_of, open_batch, with_output_shapes

FEW = 64  # images; below, all gather and all judge
WORSE = 0.02  # of accuracy that new statistics may cost: one image in fifty, and
BY_CHANCE = 3  # images in any case, for two networks that are equally good differ in a few


@dataclass(frozen=True, slots=True)
class Repair:
    """What a person asks for; `updates` is the number of training batches, for files that do not count them."""

    path: Path
    out: Path
    momentum: float | None = None
    updates: int | None = None
    data: Path | None = None
    source: Source = field(default_factory=Source)
    wishes: Wishes = field(default_factory=Wishes)


def repair(order: Repair, say: Callable[[str], None] = print) -> tuple[Mended, ...]:
    """Mend the statistics of a file and write it to `order.out`; the old ones are kept beside it.

    Raises UsageError, FileRefused or DataError; then nothing was written.
    """
    if order.out.exists():
        raise UsageError(f"--out {order.out} exists; the repaired file is a new one")
    if beside(order.out).exists():
        raise UsageError(
            f"{beside(order.out)} exists, where the old statistics would go; move it, or name another --out"
        )
    _check_suffix(order)
    subject = read_subject(order.path, order.momentum)
    if subject.model is not None:
        _refuse_unmendable(order.path, subject, subject.model)
    if order.source.function is not None and order.data is None:
        subject, _ = attach(subject, order.source, order.wishes, for_images=False, say=say)
    mended = _from_images(order, subject, say) if order.data is not None else _exactly(order, subject)
    for one in mended:
        say(one.line())
    say(f"wrote {order.out}; the old statistics are in {keep_old(order.out, mended)}")
    return mended


def _check_suffix(order: Repair) -> None:
    """Raise UsageError where the new file would bear a name that its content does not answer to."""
    wanted = ".onnx" if order.path.suffix.lower() == ".onnx" else ".safetensors"
    if order.out.suffix.lower() != wanted:
        raise UsageError(f"--out {order.out}: {order.path} is repaired as {wanted}; name the new file so")


def _refuse_unmendable(path: Path, subject: Subject, model: onnx.ModelProto) -> None:
    """Raise FileRefused for a graph that new statistics would not mend."""
    if training := training_norms(model):
        raise FileRefused(
            f"{path}: {named(tuple(training))} in training mode, which reads no running statistics; nothing was "
            "written: call `model.eval()` and export again"
        )
    if subject.folded and not norm_nodes(model.graph):
        raise FileRefused(
            f"{path}: its {counted(subject.folded, 'BatchNorm')} are folded away, statistics and all; nothing was "
            "written: repair the run or the checkpoint that it was made of, and export that"
        )
    if nested := tuple(layer.name for layer in subject.layers if layer.nested):
        raise FileRefused(
            f"{path}: {named(nested)} in a branch or a loop of the graph (If, Loop, Scan), where statistics are not "
            "mended; nothing was written: repair the checkpoint, and export that"
        )


def _exactly(order: Repair, subject: Subject) -> tuple[Mended, ...]:
    layers = with_updates(subject.layers, order.updates)
    if not layers and not subject.missing:
        raise UsageError(f"{order.path} holds no BatchNorm: there is nothing to repair")
    if not layers:
        raise UsageError(f"{order.path} holds no BatchNorm with statistics; re-estimate from images: --data FOLDER")
    mended = tuple(without_initial_share(layer) for layer in layers)
    if subject.model is None:
        _write_state(order, mended)
        return mended
    _write_graph(order, subject.model, mended)
    return mended


def _from_images(order: Repair, given: Subject, say: Callable[[str], None]) -> tuple[Mended, ...]:
    """Re-estimate on the graph in float32 with an open batch; head and preprocessing stay the owner's."""
    assert order.data is not None
    subject, wishes = attach(given, order.source, order.wishes, for_images=True, say=say)
    assert subject.model is not None
    model = in_float32(with_output_shapes(copy_of(subject.model)))
    interface = read_interface(model)
    spec, _ = choose(wishes, interface.channels, interface.size)
    refuse_huge(model, interface, spec.size)
    images, classes = folder_images(order.data, spec, 2 * CALIBRATION)
    open_batch(model, interface)
    inputs, before = inputs_for(images, interface, spec), copy_of(model)
    gathering, judging = _halves(len(images))
    mended = tuple(estimate(model, subject.layers, inputs[gathering]))
    if left := sorted({layer.name for layer in subject.layers} - {one.name for one in mended}):
        say(f"note     the graph never calls {named(tuple(left))}: left as they are")
    targets = targets_of(classes, interface.classes)
    if targets is not None:
        whose = "other" if len(gathering) < len(images) else "the same"
        say(_compared(before, model, inputs[judging], targets[judging], whose))
    if subject.checkpoint is not None:
        _write_state(order, mended)
        return mended
    _write_graph(order, subject.model, mended)
    return mended


def _halves(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which images the statistics come from and which judge them: every other one, all for both where few."""
    everything = np.arange(count)
    return (everything, everything) if count < FEW else (everything[::2], everything[1::2])


def is_worse(before: float, after: float, images: int) -> bool:
    """True where accuracy fell, over so many images, by more than is given away."""
    return round((before - after) * images) > max(BY_CHANCE, WORSE * images)


def _compared(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    inputs: NDArray[np.generic],
    targets: NDArray[np.int64],
    whose: str,
) -> str:
    """Return accuracy before and after in one line. Raises FileRefused where the new statistics are worse."""
    old, new = (accuracy(model, inputs, targets) for model in (before, after))
    seen = f"accuracy on {len(targets)} {whose} images: {old:.1%} before, {new:.1%} after"
    if is_worse(old, new, len(targets)):
        raise FileRefused(f"{seen}; nothing was written: check the preprocessing, and that the images are the model's")
    return seen


def _write_graph(order: Repair, examined: onnx.ModelProto, mended: tuple[Mended, ...]) -> None:
    """Write the file as it came with other statistics, or as it was examined where its BatchNorm lies in functions."""
    model = load_onnx(order.path)
    if model.functions:
        model = examined
    mend_graph(model, mended)
    write_atomically(order.out, model.SerializeToString())


def _write_state(order: Repair, mended: tuple[Mended, ...]) -> None:
    source = order.path / "best.safetensors" if order.path.is_dir() else order.path
    state = read_state(source)
    for one in mended:
        for word, values in zip(("running_mean", "running_var"), one.after, strict=True):
            old = state.get(f"{one.name}.{word}")
            kind = torch.float32 if old is None else old.dtype
            state[f"{one.name}.{word}"] = torch.from_numpy(values).to(kind)
        if one.share is None:  # so that nobody takes gathered statistics for those that a layer starts with
            state[f"{one.name}.num_batches_tracked"] = state.get(
                f"{one.name}.num_batches_tracked", torch.tensor(0)
            ).clamp(min=1)
    facts = {}
    if source.suffix.lower() == ".safetensors":
        with safe_open(source, framework="pt") as file:
            facts = dict(file.metadata() or {})
    shares = [one.share for one in mended if one.share is not None]
    how = f"{max(shares):.6g} taken out" if shares else "gathered from images"
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    write_atomically(order.out, save(tensors, metadata={**facts, REPAIRED_KEY: how}))
