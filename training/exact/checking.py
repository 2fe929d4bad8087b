"""Does the exact model keep what it promises? Executions against the integers, labels against the float form's."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from service.engine import Engine, choose_device, open_engine
from service.executions import EXECUTIONS, execute_as
from service.independence.exactness import reference_logits
from service.independence.probe import same_bits
from service.integers import Steps
from training.errors import ExportRefused

BUDGET_S = 60.0
FEWEST = 8
CHUNK = 32

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]
Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Images uint8 (N, height, width, channels) with what they show, integers (N,)."""

    images: Pixels
    targets: NDArray[np.int64]


def open_model(model: onnx.ModelProto) -> Engine:
    """Return an engine on the CPU for an ONNX model."""
    return open_engine(model.SerializeToString(), choose_device("cpu"))


def logits_of(engine: Engine, images: Pixels) -> Logits:
    """Return the logits (N, K) of many images, some at a time."""
    return np.concatenate([engine.run(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)])


def accuracy(logits: Logits, labelled: Labelled) -> float:
    """Return the share of images whose largest logit is the right one."""
    return float((logits.argmax(1) == labelled.targets).mean())


def check_executions(model: onnx.ModelProto, steps: Steps, images: Pixels, report: Report) -> tuple[int, list[str]]:
    """Hold every execution against the integers, on as many of `images` as fit in BUDGET_S, at least FEWEST.

    Returns how many images that were, and the executions that have other bits on this machine: a processor without
    VNNI saturates signed products, which is its kernels' fault and no reason to refuse the file. Raises ExportRefused
    where the twin differs, for it computes nothing that this machine could not.
    """
    engines = {execution: open_model(execute_as(model, execution)) for execution in EXECUTIONS}
    differing: set[str] = set()
    started, seen = time.perf_counter(), 0
    while seen < len(images) and (seen < FEWEST or time.perf_counter() - started < BUDGET_S):
        part = images[seen : seen + (FEWEST if seen == 0 else CHUNK)]
        wanted = reference_logits(steps, part)
        differing |= {name for name, engine in engines.items() if not same_bits(engine.run(part), wanted)}
        seen += len(part)
        report("holding executions against the integers", min(1.0, (time.perf_counter() - started) / BUDGET_S))
    if "twin" in differing or len(differing) == len(EXECUTIONS):
        names = ", ".join(sorted(differing))
        raise ExportRefused(f"of the exact model the execution {names} has other bits than its integers")
    return seen, sorted(differing)
