"""A function of one byte → its 256 values, computed in float64 by ONNX's own reference."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.errors import NotExact
from service.integers.steps import BYTE, Operand, Table
from service.reference import evaluator_of

# Elementwise, and with one value for each input value; no clock, no chance, no memory.
FUNCTIONS = frozenset({
    "Abs", "Add", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max", "Min",
    "Mish", "Mul", "Neg", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Tanh",
    "ThresholdedRelu",
})  # fmt: skip
# Float32 implementations of these differ by some 10⁻⁶ relative, a few 10⁻⁴ of a step at 255.
LEAST_ROOM = 1e-3


def read_table(
    name: str,
    source: str,
    x: Operand,
    nodes: Sequence[onnx.NodeProto],
    y: Operand,
    constants: Mapping[str, NDArray[Any]],
    opset: int,
    ends: Sequence[onnx.NodeProto] = (),
) -> Table:
    """Return the table of `nodes`, which take the float tensor `source` and scalar constants, between its `ends`.

    Raises NotExact for an operator that is no function of one number, and where a value lies so near to where rounding
    turns that two runtimes may disagree.
    """
    for node in nodes:
        if node.op_type not in FUNCTIONS:
            raise NotExact(
                f"node {node.name or node.output[0]} ({node.op_type}): not known as a function of one number"
            )
        if vector := [one for one in node.input if one in constants and constants[one].size != 1]:
            raise NotExact(f"node {node.name or node.output[0]}: its constant {vector[0]} is not one number")
    steps = (np.arange(256) - x.zero).astype(np.float64) * x.scale
    values = _evaluate(source, nodes, steps, constants, opset) / y.scale
    if not np.isfinite(values).all():
        raise NotExact(f"node {name}: its table holds values that are not finite")
    entries, room = round_to_bytes(values, y.zero)
    if room < LEAST_ROOM:
        raise NotExact(f"node {name}: a value of its table lies {room:.1g} of a step from where rounding turns")
    return Table(name, x.tensor, y.tensor, entries, room, (*ends[:1], *nodes, *ends[1:]))


def round_to_bytes(values: NDArray[np.float64], zero: int) -> tuple[NDArray[np.uint8], float]:
    """Return round-half-even of `values`, finite, plus `zero` as bytes, and the least distance to a turn that shows."""
    entries = np.clip(np.rint(values) + zero, 0, BYTE)
    below, above = np.clip(np.floor(values) + zero, 0, BYTE), np.clip(np.ceil(values) + zero, 0, BYTE)
    distances = np.abs(values - np.floor(values) - 0.5)[below != above]
    return entries.astype(np.uint8), float(distances.min(initial=0.5))


def _evaluate(
    source: str,
    nodes: Sequence[onnx.NodeProto],
    values: NDArray[np.float64],
    constants: Mapping[str, NDArray[Any]],
    opset: int,
) -> NDArray[np.float64]:
    used = {one for node in nodes for one in node.input if one in constants}
    graph = helper.make_graph(
        list(nodes),
        "table",
        [helper.make_tensor_value_info(source, TensorProto.DOUBLE, [len(values)])],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.DOUBLE, [len(values)])],
        [numpy_helper.from_array(constants[one].astype(np.float64), one) for one in sorted(used)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    with np.errstate(all="ignore"):  # what is not finite is refused by its caller
        answers: Any = evaluator_of(model).run(None, {source: values})
    return np.asarray(answers[0], np.float64)
