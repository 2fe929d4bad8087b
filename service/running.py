"""Runs a model's images in its certified shapes only, padded with the one filler. Knows no queue and no web."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.engine import Shape
from service.errors import InferenceFailed
from service.exact_engine import ExactEngine
from service.independence.certificate import Certificate
from service.independence.probe import fill
from service.planning import Planner
from service.repository import Model

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One image to run; `is_replay`: alone, at the reference shape, whatever the load."""

    pixels: Pixels
    is_replay: bool = False


class Observer(Protocol):
    """Told what happens, for metrics; from the thread that ran it."""

    def executed(self, rows: int, padding: int) -> None:
        """A batch of `rows` was executed, `padding` of which held no image."""

    def answered(self, images: Pixels, logits: Logits) -> None:
        """Images (N, height, width, channels) were answered with logits (N, classes)."""


class Runner:
    """One model, and the shapes that it may run in. Safe to call from several threads.

    Without a certificate (mode `report` or `off`) it runs whatever comes together, as it comes.
    """

    def __init__(self, model: Model, certificate: Certificate | None, observer: Observer | None = None) -> None:
        self._model = model
        self._observer = observer
        self._lock = threading.Lock()
        self._started: dict[int, float] = {}  # when each run under way began, by its thread
        self.is_degraded = False
        self.is_refuted = False
        self.reference: Shape | None = None
        self._planner: Planner | None = None
        if certificate is not None and certificate.reference is not None:
            self.reference = certificate.reference.shape
            served = {record.shape for record in certificate.shapes}
            costs = {cost.shape.shape: cost.seconds for cost in certificate.measured.costs}
            self._planner = Planner({shape: cost for shape, cost in costs.items() if shape in served})

    def take(self, waiting: int, idle_lanes: int) -> int:
        """Return how many of the waiting images an idle lane runs next."""
        if self._planner is None:
            return -(-waiting // idle_lanes)
        return self._planner.take(waiting, idle_lanes)

    @property
    def most_together(self) -> int | None:
        """How many images one run takes at most, or None where nothing but the batcher bounds it."""
        return None if self._planner is None else self._planner.largest

    @property
    def enough(self) -> int | None:
        """How many waiting images a busy lane may take as its next run, or None where it takes none."""
        return None if self._planner is None else self._planner.enough

    def run(self, jobs: Sequence[Job]) -> list[Logits]:
        """Return the logits (classes,) of each job. Raises InferenceFailed where a model gives what is not finite."""
        thread = threading.get_ident()
        with self._lock:
            self._started[thread] = time.monotonic()
            alone = len(self._started) == 1
        try:
            together = [job.pixels for job in jobs if not job.is_replay]
            answers = iter(self._answer(_stack(together), alone=alone) if together else ())
            return [self.replay(job.pixels) if job.is_replay else next(answers) for job in jobs]
        finally:
            with self._lock:
                del self._started[thread]

    @property
    def longest_run_s(self) -> float:
        """How long the oldest run under way has taken, seconds; 0 where none is."""
        with self._lock:
            return time.monotonic() - min(self._started.values()) if self._started else 0.0

    def replay(self, pixels: Pixels) -> Logits:
        """Return the logits (classes,) of one image by itself, at the reference shape."""
        reference = self.reference or Shape(1, 1)
        logits: Logits = self._model.run(fill(pixels[np.newaxis], reference.batch_size), reference.threads)[0]
        return logits

    def degrade(self, *, is_refuted: bool = False) -> None:
        """From now on run at the reference shape only: something gave other bits than certified.

        An exact model goes on to its other execution as well, which computes the same integers by other kernels.

        `is_refuted`: the reference itself changed its bits, so that the certificate says nothing any more.
        """
        self.is_refuted |= is_refuted
        if self.reference is not None:
            self._planner = Planner({self.reference: 1.0})
        if isinstance(self._model.engine, ExactEngine) and self._model.engine.fall_back():
            logger.warning("model %s goes on with the execution %s", self._model.name, self._model.engine.execution)
        self.is_degraded = True

    def _answer(self, images: Pixels, *, alone: bool) -> Logits:
        logits = self._run_together(images, alone=alone)
        if len(logits) != len(images):
            raise InferenceFailed(f"the engine gave {len(logits)} answers for {len(images)} images")
        if self._observer is not None:
            self._observer.answered(images, logits)
        return logits

    def _run_together(self, images: Pixels, *, alone: bool) -> Logits:
        planner = self._planner  # read once: degrading may replace it
        if planner is None:
            self._tell_executed(len(images), 0)
            return self._model.run(images)
        if len(images) > planner.largest:  # formed before a degradation left only smaller shapes
            parts = images[: planner.largest], images[planner.largest :]
            return np.concatenate([self._run_together(part, alone=False) for part in parts])
        shape = planner.shape(len(images), alone=alone)
        logits = self._model.run(fill(images, shape.batch_size), shape.threads)[: len(images)]
        self._tell_executed(shape.batch_size, shape.batch_size - len(images))
        return logits

    def _tell_executed(self, rows: int, padding: int) -> None:
        if self._observer is not None:
            self._observer.executed(rows, padding)


def _stack(images: Sequence[Pixels]) -> Pixels:
    if len(images) == 1:
        return images[0][np.newaxis]  # a lone image needs no copy
    # By `np.stack` it would let go of the interpreter at each image, and wait for the event loop to give it back.
    joined = np.frombuffer(b"".join([one.data for one in images]), np.uint8)
    return joined.reshape(len(images), *images[0].shape)
