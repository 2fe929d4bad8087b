"""`foldserve repair`: reads a file, mends it, writes another, and shows before and after."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch
from safetensors import safe_open
from safetensors.torch import save

from training.checkpoint import write_atomically
from training.doctor.norms import Subject
from training.doctor.read import REPAIRED_KEY, read_state, read_subject
from training.doctor.repair import Mended, estimate, keep_old, mend_graph, with_updates, without_initial_share
from training.errors import UsageError
from training.foreign.precision import in_float32
from training.importing.images import CALIBRATION, folder_images
from training.importing.interface import read_interface
from training.importing.original import inputs_for
from training.importing.preprocessing import Wishes, choose
from training.importing.rewrite import copy_of, open_batch, with_output_shapes


@dataclass(frozen=True, slots=True)
class Repair:
    """What a person asks for; `updates` is the number of training batches, for files that do not count them."""

    path: Path
    out: Path
    momentum: float | None = None
    updates: int | None = None
    data: Path | None = None
    wishes: Wishes = field(default_factory=Wishes)


def repair(order: Repair, say: Callable[[str], None] = print) -> tuple[Mended, ...]:
    """Mend the statistics of a file and write it to `order.out`; the old ones are kept beside it.

    Raises UsageError, FileRefused or DataError; then nothing was written.
    """
    if order.out.exists():
        raise UsageError(f"--out {order.out} exists; the repaired file is a new one")
    subject = read_subject(order.path, order.momentum)
    mended = _from_images(order, subject) if order.data is not None else _exactly(order, subject)
    for one in mended:
        say(one.line())
    say(f"wrote {order.out}; the old statistics are in {keep_old(order.out, mended)}")
    return mended


def _exactly(order: Repair, subject: Subject) -> tuple[Mended, ...]:
    layers = with_updates(subject.layers, order.updates)
    if not layers:
        raise UsageError(f"{order.path} holds no BatchNorm with statistics; re-estimate from images: --data FOLDER")
    mended = tuple(without_initial_share(layer) for layer in layers)
    if subject.model is None:
        _write_state(order, mended)
        return mended
    model = onnx.ModelProto()
    model.CopyFrom(subject.model)
    mend_graph(model, mended)
    write_atomically(order.out, model.SerializeToString())
    return mended


def _from_images(order: Repair, subject: Subject) -> tuple[Mended, ...]:
    """Re-estimate on the graph in float32 with an open batch; head and preprocessing stay the owner's."""
    if subject.model is None or order.data is None:
        raise UsageError(f"{order.path} has no graph to run images through; give its ONNX export with --data")
    model = in_float32(with_output_shapes(copy_of(subject.model)))
    interface = read_interface(model)
    spec, _ = choose(order.wishes, interface.channels, interface.size)
    images, _ = folder_images(order.data, spec, CALIBRATION)
    open_batch(model, interface)
    mended = tuple(estimate(model, subject.layers, inputs_for(images, interface, spec)))
    original = onnx.ModelProto()
    original.CopyFrom(subject.model)
    mend_graph(original, mended)
    write_atomically(order.out, original.SerializeToString())
    return mended


def _write_state(order: Repair, mended: tuple[Mended, ...]) -> None:
    source = order.path / "best.safetensors" if order.path.is_dir() else order.path
    state = read_state(source)
    for one in mended:
        for word, values in zip(("running_mean", "running_var"), one.after, strict=True):
            kind = state[f"{one.name}.{word}"].dtype
            state[f"{one.name}.{word}"] = torch.from_numpy(values).to(kind)
    facts = {}
    if source.suffix == ".safetensors":
        with safe_open(source, framework="pt") as file:
            facts = dict(file.metadata() or {})
    share = max(one.share or 0.0 for one in mended)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    write_atomically(order.out, save(tensors, metadata={**facts, REPAIRED_KEY: f"{share:.6g} taken out"}))
