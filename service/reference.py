"""ONNX's own evaluator, imported when it is first asked: 9 MB, for nothing where there are no constants to work out."""

from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:
    from onnx.reference import ReferenceEvaluator


def evaluator_of(graph: onnx.ModelProto | onnx.FunctionProto) -> "ReferenceEvaluator":
    """Return an evaluator of a model or a function; its `run` gives NumPy's results, a list in the order of outputs."""
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 - see above

    return ReferenceEvaluator(graph)
