"""Runs an ONNX graph in float64 over many images, as a measure for what float32 gives."""

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from training.errors import FileRefused
from training.folding.evaluation import OPERATORS, in_float64
from training.foreign.read import inputs_of

CHUNK = 4  # every value inside the graph is held until a run ends


class Float64:
    """The model in float64; `run` takes what the model takes, in any number."""

    def __init__(self, model: onnx.ModelProto) -> None:
        wide = in_float64(model)
        self._input = inputs_of(wide.graph)[0].name
        self._output = wide.graph.output[0].name
        try:
            self._evaluator = ReferenceEvaluator(wide, new_ops=[*OPERATORS])
        except Exception as error:  # it raises whatever its operators do
            raise FileRefused(f"the graph cannot be run in float64: {type(error).__name__}: {error}") from error

    def run(self, images: NDArray[Any]) -> NDArray[np.float64]:
        """Return the first output (N, K) in float64. Raises FileRefused for an operator that cannot be run so."""
        parts = [self._run(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
        return np.concatenate(parts).astype(np.float64)

    def _run(self, images: NDArray[Any]) -> NDArray[Any]:
        floats = images if images.dtype == np.uint8 else images.astype(np.float64)
        try:
            with torch.no_grad(), np.errstate(all="ignore"):
                outputs: Any = self._evaluator.run([self._output], {self._input: floats})
        except Exception as error:  # the evaluator raises whatever NumPy does
            raise FileRefused(f"the graph cannot be run in float64: {type(error).__name__}: {error}") from error
        return np.asarray(outputs[0])
