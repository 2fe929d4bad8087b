"""An exact model's engine: one of its executions, and the next one where kernels turn out not to keep the integers."""

import logging
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from service.engine import Device, Engine, OpenEngine
from service.exact_tables import wrong_tables
from service.executions import Execution, execute_as
from service.processor import saturates_signed_products

logger = logging.getLogger(__name__)


def executions_for(device: Device) -> tuple[Execution, ...]:
    """Return the executions worth trying on a device, the fastest that can be right first."""
    if device.used == "cuda":
        return ("twin",)
    return ("unsigned", "twin") if saturates_signed_products() else ("integer", "unsigned", "twin")


class ExactEngine:
    """Runs an exact model; `fall_back` goes on to its next execution. Safe to call from several threads."""

    def __init__(
        self, model_bytes: bytes, device: Device, open_engine: OpenEngine, executions: tuple[Execution, ...] = ()
    ) -> None:
        self._model = onnx.load_model_from_string(model_bytes)
        self._device = device
        self._open_engine = open_engine
        self._left = list(executions or executions_for(device))
        self.execution: Execution = "twin"
        self._engine = self._open_next()

    def run(self, images: NDArray[np.uint8], threads: int = 1) -> NDArray[np.float32]:
        """Return logits (N, classes), float32, for images (N, height, width, channels), uint8."""
        return self._engine.run(images, threads)

    def describe(self) -> dict[str, Any]:
        """Return what the inner engine says of itself, and the execution that it runs."""
        return {**self._engine.describe(), "execution": self.execution}

    def plain_convolutions(self) -> tuple[str, ...]:
        """Return none: exact sums don't depend on how threads cut them."""
        return ()

    def settle(self) -> None:
        """Let the inner engine settle; one that comes after a fall keeps all that it has."""
        self._engine.settle()

    def fall_back(self) -> bool:
        """Go on to the next execution; False where none is left. The same integers, by other kernels."""
        if not self._left:
            return False
        self._engine = self._open_next()
        return True

    def _open_next(self) -> Engine:
        """Open the next execution whose functions this runtime computes as the file says; the twin looks them up."""
        self.execution = self._left.pop(0)
        while self._left and self.execution != "twin" and (wrong := wrong_tables(self._model, self._open)):
            logger.warning("execution %s is passed over: here %s gives other values", self.execution, wrong[0])
            self.execution = self._left.pop(0)
        return self._open(execute_as(self._model, self.execution).SerializeToString())

    def _open(self, model_bytes: bytes) -> Engine:
        return self._open_engine(model_bytes, self._device)
