"""Other executions of an exact model: the same integers, written for kernels that the stored file does not suit.

    integer     the file as it is: QLinearConv with signed weights
    unsigned    weights moved up by 128, for processors whose kernels for signed weights saturate sums of two products
    twin        float32 that holds the integers, for CUDA and for other runtimes

None is another model: each is derived from the file's steps, and the probe holds each against the integer reference.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.integers import Convolution, Head, Move, Pair, Steps, Table, read_steps
from service.integers.steps import BYTE, Operand, Step

Execution = Literal["integer", "unsigned", "twin"]
EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
UP = 128  # what unsigned weights are moved by
Array = NDArray[Any]


def execute_as(model: onnx.ModelProto, execution: Execution) -> onnx.ModelProto:
    """Return `model`, which is exact, as the execution asked for. Raises NotExact where it is not in the grammar."""
    rewrite: dict[Execution, Callable[[onnx.ModelProto], onnx.ModelProto]]
    rewrite = {"integer": lambda one: one, "unsigned": unsigned, "twin": float_twin}
    return rewrite[execution](model)


def unsigned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with weights w + 128 of zero point 128, which computes the same integers."""
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    places = {"QLinearConv": (3, 5), "MatMulInteger": (1, 3)}
    names = {
        node.input[at]: at
        for node in moved.graph.node
        for at in places.get(node.op_type, ())
        if at < len(node.input) and node.input[at]
    }
    for tensor in moved.graph.initializer:
        if tensor.name in names:
            raised = numpy_helper.to_array(tensor).astype(np.int16) + UP
            tensor.CopyFrom(numpy_helper.from_array(raised.astype(np.uint8), tensor.name))
    return moved


def float_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model in float32: Conv → Round → Mul → Round → Clip, standard operators, the same bits.

    The first Round changes nothing, for sums are integers: it keeps optimizers from moving the factor behind it into
    the weights, where the sum would round.
    """
    return _Twin(model).write()


class _Twin:
    """Writes the twin of one file, step by step; tensors keep their names, and hold the same bytes as float32."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._steps: Steps = read_steps(model)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def write(self) -> onnx.ModelProto:
        for step in self._with_cast(self._steps.steps):
            self._write(step)
        twin = onnx.ModelProto()
        twin.CopyFrom(self._model)
        del twin.graph.node[:], twin.graph.initializer[:], twin.graph.value_info[:]
        twin.graph.node.extend(self._nodes)
        twin.graph.initializer.extend(self._constants.values())
        return twin

    def _with_cast(self, steps: tuple[Step, ...]) -> Iterator[Step]:
        """Yield the steps, casting pixels once; a transpose before that moves bytes, a quarter of what floats are."""
        first, image = steps[0], self._steps.image
        readers = [node for node in self._model.graph.node if image in node.input]
        early = isinstance(first, Move) and first.node.op_type == "Transpose" and len(readers) == 1
        if early:
            assert isinstance(first, Move)
            moved = self._copy(first.node, rename={first.outputs[0]: f"{first.outputs[0]}/bytes"})
            moved.name = moved.output[0]
            self._nodes.append(moved)
            self._add("Cast", [moved.output[0]], first.outputs[0], to=TensorProto.FLOAT)
        else:
            self._add("Cast", [image], f"{image}/float", to=TensorProto.FLOAT)
        yield from steps[1:] if early else steps

    def _write(self, step: Step) -> None:
        writers: dict[type, Callable[[Any], None]] = {
            Move: self._move,
            Convolution: self._convolution,
            Pair: self._pair,
            Table: self._table,
            Head: self._head,
        }
        writers[type(step)](step)

    def _move(self, step: Move) -> None:
        node = self._copy(step.node, rename={self._steps.image: f"{self._steps.image}/float"})
        for place, array in step.constants.items():
            held = self._number(int(array.reshape(()))) if array.dtype == np.uint8 else step.node.input[place]
            node.input[place] = held if array.dtype == np.uint8 else self._constant(held, array)
        self._nodes.append(node)

    def _convolution(self, step: Convolution) -> None:
        name = step.y
        weight = self._constant(f"{name}/weight", step.weight.astype(np.float32))
        bias = self._constant(f"{name}/bias", step.bias.astype(np.float32))
        self._add(
            "Conv",
            [self._centred(step.x, step.x_zero, name), weight, bias],
            f"{name}/sum",
            strides=step.strides,
            pads=step.pads,
            dilations=step.dilations,
            group=step.groups,
        )
        factor = step.factor.reshape(-1, *[1] * (step.weight.ndim - 2))
        self._scale_and_clip(f"{name}/sum", self._constant(f"{name}/factor", factor), step.y_zero, name)

    def _pair(self, step: Pair) -> None:
        name = step.y.tensor
        sides = [self._side(side, f"{name}/{which}") for side, which in ((step.a, "a"), (step.b, "b"))]
        self._add(step.operation, sides, f"{name}/pair")
        factor = self._constant(f"{name}/factor", np.float32(1 / step.y.scale))
        self._add("Mul", [f"{name}/pair", factor], f"{name}/scaled")
        self._clip(f"{name}/scaled", step.y.zero, name)

    def _side(self, side: Operand, name: str) -> str:
        centred = self._centred(side.tensor, side.zero, name)
        if side.scale == 1:
            return centred
        return self._add("Mul", [centred, self._constant(f"{name}/scale", np.float32(side.scale))], name)

    def _table(self, step: Table) -> None:
        index = self._add("Cast", [self._centred(step.x, 0, "")], f"{step.y}/index", to=TensorProto.INT32)
        entries = self._constant(f"{step.y}/entries", step.entries.astype(np.float32))
        self._add("Gather", [entries, index], step.y)

    def _head(self, step: Head) -> None:
        name = step.y
        weight = self._constant(f"{name}/weight", step.weight.astype(np.float32))
        bias = self._constant(f"{name}/bias", step.bias.astype(np.float32))
        self._add("MatMul", [self._centred(step.x, step.x_zero, name), weight], f"{name}/product")
        self._add("Add", [f"{name}/product", bias], f"{name}/sum")
        self._add("Round", [f"{name}/sum"], f"{name}/whole")
        self._add("Mul", [f"{name}/whole", self._constant(f"{name}/scale", step.scale)], name)

    def _scale_and_clip(self, total: str, factor: str, zero: int, name: str) -> None:
        self._add("Round", [total], f"{name}/whole")
        self._add("Mul", [f"{name}/whole", factor], f"{name}/scaled")
        self._clip(f"{name}/scaled", zero, name)

    def _clip(self, value: str, zero: int, name: str) -> None:
        rounded = self._add("Round", [value], f"{name}/rounded")
        if zero:
            rounded = self._add("Add", [rounded, self._number(zero)], f"{name}/moved")
        self._add("Clip", [rounded, self._number(0), self._number(BYTE)], name)

    def _centred(self, tensor: str, zero: int, name: str) -> str:
        tensor = f"{tensor}/float" if tensor == self._steps.image else tensor
        return self._add("Sub", [tensor, self._number(zero)], f"{name}/centred") if zero else tensor

    def _number(self, value: int) -> str:
        return self._constant(f"number/{value}", np.float32(value))

    def _constant(self, name: str, array: Array | np.floating[Any]) -> str:
        self._constants.setdefault(name, numpy_helper.from_array(np.asarray(array), name))
        return name

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    @staticmethod
    def _copy(node: onnx.NodeProto, rename: dict[str, str]) -> onnx.NodeProto:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        for names in (copied.input, copied.output):
            for place, name in enumerate(names):
                names[place] = rename.get(name, name)
        return copied
