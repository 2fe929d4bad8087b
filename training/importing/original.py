"""The untouched foreign file against the rewritten one: what a caller of the original would have got."""

import numpy as np
import onnx
from numpy.typing import NDArray

from service.engine import OnnxEngine, choose_device, open_engine
from service.preprocessing import Preprocessing
from service.wording import counted
from training.errors import ExportRefused
from training.importing.interface import Interface
from training.parity import Reference

FREE_BATCH = 8


def inputs_for(images: NDArray[np.uint8], interface: Interface, spec: Preprocessing) -> NDArray[np.generic]:
    """Prepare pixels as the owner of the file would, in NumPy: (N, H, W, C), or (N, C, H, W)."""
    ready: NDArray[np.generic] = images
    if not interface.takes_bytes:
        ready = ((images / 255 - np.array(spec.mean)) / np.array(spec.std)).astype(np.float32)
    return ready if interface.channels_last else ready.transpose(0, 3, 1, 2)


def hold_against_original(
    original: onnx.ModelProto,
    interface: Interface,
    spec: Preprocessing,
    images: NDArray[np.uint8],
    wanted: Reference,
    *,
    softmax: str | None,
) -> str:
    """Run the file as its owner would, at its own batch size, and return what was seen in one line.

    `wanted` answers the same images through the new entry, without softmax. Raises ExportRefused where they differ by
    more than rounding explains.
    """
    engine = open_engine(original.SerializeToString(), choose_device("cpu"))
    found = _run(engine, inputs_for(images, interface, spec), interface.batch or FREE_BATCH)
    meant, limit = _as_answered(wanted, softmax)
    difference = float(np.abs(found.reshape(meant.shape) - meant).max())
    if not difference <= limit:
        raise ExportRefused(
            f"the file itself and its float64 reference differ by {difference:.3g}, rounding explains {limit:.3g}; "
            "nothing was written. Please report this with the file"
        )
    flips = int((found.reshape(meant.shape).argmax(1) != meant.argmax(1)).sum())
    kind = "probabilities" if softmax == "Softmax" else "scores"
    seen = f"largest difference of {kind} {difference:.2g}, {counted(flips, 'label')} flipped"
    return f"the file as it came, on {counted(len(images), 'image')}: {seen}"


def _run(engine: OnnxEngine, inputs: NDArray[np.generic], batch: int) -> NDArray[np.float64]:
    """Run in groups of exactly `batch`; the last is filled up with its last image."""
    answers = []
    for start in range(0, len(inputs), batch):
        group = inputs[start : start + batch]
        filled = np.concatenate([group, np.repeat(group[-1:], batch - len(group), axis=0)])
        answers.append(engine.run(np.ascontiguousarray(filled))[: len(group)])
    return np.concatenate(answers).astype(np.float64)


def _as_answered(wanted: Reference, softmax: str | None) -> tuple[NDArray[np.float64], float]:
    """Return what the original should answer, and the limit: a softmax moves by at most twice what its logits move."""
    if softmax is None:
        return wanted.logits, wanted.limit
    shifted = wanted.logits - wanted.logits.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    limit = 2 * wanted.limit + 8 * float(np.finfo(np.float32).eps)
    return (logs, limit + 1e-6 * float(np.abs(logs).max())) if softmax == "LogSoftmax" else (np.exp(logs), limit)
