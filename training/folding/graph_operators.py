"""What each ONNX operator is to folding: a layer, a scale and shift, a passage, a join. All others are `Other`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from training.errors import NotFoldable
from training.folding.algebra import Affine, Norm
from training.folding.arithmetic import affine_of, per_channel
from training.folding.graph_constants import Constants
from training.folding.network import Account, Join, Layer, Other, Passage, Rescale, Step, Value
from training.folding.passages import Passing, Rectifier, Reduction, Regrouping, Stays, Transposition, Unchanged, Window

AnyStep = TypeVar("AnyStep", bound=Step)


@dataclass(slots=True)
class Call:
    """One node with what is known around it; `limits` are the largest numbers by the type of a tensor's name."""

    node: NodeProto
    opset: int
    constants: Constants
    value: Callable[[str], Value]
    limit: Callable[[str], float]
    unused: Callable[[str], bool]
    _attributes: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._attributes = {entry.name: helper.get_attribute_value(entry) for entry in self.node.attribute}

    @property
    def name(self) -> str:
        """The node's name in the file, or that of its output."""
        return self.node.name or self.node.output[0]

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute, bytes as text."""
        value = self._attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def input(self, index: int) -> str:
        """Return the name of an input, "" where it is left out."""
        return self.node.input[index] if index < len(self.node.input) else ""

    def floats(self, index: int) -> NDArray[np.float64] | None:
        """Return a constant input, None where it is left out or not constant."""
        return self.constants.floats(self.input(index)) if self.input(index) else None

    def is_variable(self, index: int) -> bool:
        """Whether an input is there and not a readable constant."""
        return bool(self.input(index)) and self.constants.array(self.input(index)) is None

    def step(self, kind: type[AnyStep], *inputs: int, **fields: Any) -> AnyStep:
        """Make a step of this node; `inputs` are the indices of what flows in."""
        flowing = [self.value(self.node.input[index]) for index in inputs or (0,) if index < len(self.node.input)]
        output = self.value(self.node.output[0])
        return kind(name=self.name, kind=self.node.op_type, inputs=flowing, output=output, **fields)


def read_node(call: Call) -> Step:
    """Return the step that a node is. Raises NotFoldable for a BatchNorm that must not be trusted."""
    reader = READERS.get(call.node.op_type) if call.node.domain in {"", "ai.onnx"} else None
    if reader is None:
        return _other(call, "")
    if any(not call.unused(name) for name in call.node.output[1:] if name):
        return _other(call, f"{call.node.op_type} {call.name} gives more than one output")
    try:
        return reader(call)
    except Stays as reason:
        return _other(call, str(reason))


def _other(call: Call, note: str) -> Step:
    flowing = [index for index, name in enumerate(call.node.input) if name and not call.constants.has(name)]
    step = call.step(Other, note=note)
    step.inputs = [call.value(call.node.input[index]) for index in flowing]
    return step


def _convolution(call: Call) -> Step:
    weight = call.floats(1)
    if weight is None or call.is_variable(2):
        raise Stays(f"{call.node.op_type} {call.name}, whose weights are not constants of the file")
    pads = call.attribute("pads") or [0]
    padded = any(pads) or call.attribute("auto_pad", "NOTSET").startswith("SAME")
    return call.step(
        Layer,
        weight=weight,
        bias=call.floats(2),
        groups=call.attribute("group", 1),
        transposed=call.node.op_type == "ConvTranspose",
        pads_zeros=padded and (any(pads) or any(size > 1 for size in weight.shape[2:])),
        limit=call.limit(call.input(1)),
    )


def _gemm(call: Call) -> Step:
    weight, bias = call.floats(1), call.floats(2)
    if weight is None or weight.ndim != 2 or call.is_variable(2) or call.attribute("transA", 0):
        raise Stays(f"Gemm {call.name}, whose weights are not constants of the file")
    weight = call.attribute("alpha", 1.0) * (weight if call.attribute("transB", 0) else weight.T)
    if bias is not None:
        if bias.ndim and bias.size != bias.shape[-1]:
            raise Stays(f"Gemm {call.name}, whose bias differs from image to image")
        bias = call.attribute("beta", 1.0) * np.broadcast_to(bias.ravel(), weight.shape[:1])
    return call.step(Layer, weight=weight, bias=bias, limit=call.limit(call.input(1)))


def _matmul(call: Call) -> Step:
    weight = call.floats(1)
    if weight is None or weight.ndim != 2 or call.constants.has(call.input(0)):
        raise Stays(f"MatMul {call.name}, whose second factor is not a constant matrix of the file")
    return call.step(Layer, weight=weight.T, bias=None, limit=call.limit(call.input(1)))


def _batch_norm(call: Call) -> Step:
    if call.attribute("training_mode", 0) or any(call.node.output[1:]):
        raise NotFoldable(
            f"BatchNorm {call.name} is in training mode, where an answer depends on the rest of its batch; "
            "export the model in evaluation mode"
        )
    weight, bias, mean, variance = (call.floats(index) for index in range(1, 5))
    if weight is None or bias is None or mean is None or variance is None:
        raise Stays(f"BatchNormalization {call.name}, whose statistics are not constants of the file")
    try:
        affine = Affine(*Norm(mean, variance, call.attribute("epsilon", 1e-5), weight, bias).scale_and_shift())
    except NotFoldable as error:
        raise NotFoldable(f"BatchNorm {call.name}: {error}") from None
    account = Account.of(call.name, call.node.op_type, affine)
    return call.step(Rescale, affine=affine, axis=1, accounts=[account])


def _arithmetic(call: Call) -> Step:
    """Read x·c, x/c, x ± c and c − x; a sum of two values that flow is a join."""
    variable = [index for index in (0, 1) if not call.constants.has(call.input(index))]
    if len(variable) == 2 and call.node.op_type in {"Add", "Sub"}:
        return call.step(Join, 0, 1)
    constant = call.floats(1 - variable[0]) if len(variable) == 1 else None
    if constant is None:
        raise Stays("")
    values, axis = per_channel(constant, call.value(call.input(variable[0])).shape)
    affine = affine_of(call.node.op_type, values, swapped=variable[0] == 1)
    account = Account.of(call.name, call.node.op_type, affine)
    notable = axis is not None and not (affine.scale == 1).all()
    return call.step(Rescale, *variable, affine=affine, axis=axis, accounts=[account], notable=notable)


def _passing(rule: Callable[[Call], Passing]) -> Callable[[Call], Step]:
    return lambda call: call.step(Passage, rule=rule(call))


def _dropout(call: Call) -> Passing:
    training = call.constants.array(call.input(2)) if call.input(2) else np.zeros(1)
    if training is None or training.any():
        raise Stays(f"Dropout {call.name} in training mode")
    return Unchanged()


def _average_pool(call: Call) -> Passing:
    padded = any(call.attribute("pads") or [0]) or call.attribute("auto_pad", "NOTSET").startswith("SAME")
    # What windows over the edge count where ceil_mode is set has differed between runtimes.
    edge = padded or call.attribute("ceil_mode", 0)
    return Window(largest=False, counts_zeros=bool(call.attribute("count_include_pad", 0) and edge))


def _reduction(call: Call) -> Passing:
    rank = call.value(call.input(0)).rank
    axes = call.attribute("axes") or (call.constants.integers(call.input(1)) if call.input(1) else None)
    if not rank or not axes:
        raise Stays(f"{call.node.op_type} {call.name} over axes that are not known")
    axes = tuple(axis % rank for axis in axes)
    return Reduction(call.node.op_type == "ReduceMax", axes, rank, bool(call.attribute("keepdims", 1)))


def _transposition(call: Call) -> Passing:
    permutation = call.attribute("perm")
    if permutation is None:
        rank = call.value(call.input(0)).rank
        if rank is None:
            raise Stays(f"Transpose {call.name} of a value whose rank is not known")
        permutation = range(rank)[::-1]
    return Transposition(tuple(permutation))


def _regrouping(call: Call) -> Passing:
    return Regrouping(call.value(call.input(0)).shape, call.value(call.node.output[0]).shape)


def _concat(call: Call) -> Step:
    inputs = range(len(call.node.input))
    if any(call.constants.has(name) for name in call.node.input):
        raise Stays(f"Concat {call.name}, one of whose branches is constant")
    axis, rank = call.attribute("axis", 1), call.value(call.node.output[0]).rank
    if axis < 0 and rank is None:
        raise Stays(f"Concat {call.name} of values whose rank is not known")
    return call.step(Join, *inputs, axis=axis if axis >= 0 else axis + (rank or 0))


READERS: dict[str, Callable[[Call], Step]] = {
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    "Concat": _concat,
    "Identity": _passing(lambda _: Unchanged()),
    "Dropout": _passing(_dropout),
    "Relu": _passing(lambda _: Rectifier()),
    "LeakyRelu": _passing(lambda _: Rectifier()),
    "MaxPool": _passing(lambda _: Window(largest=True)),
    "GlobalMaxPool": _passing(lambda _: Window(largest=True)),
    "AveragePool": _passing(_average_pool),
    "GlobalAveragePool": _passing(lambda _: Window(largest=False)),
    "ReduceMean": _passing(_reduction),
    "ReduceMax": _passing(_reduction),
    "Transpose": _passing(_transposition),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _passing(_regrouping)),
}
