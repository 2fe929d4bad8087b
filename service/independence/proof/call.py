"""One operator at work: the node, its attributes and what is known of its inputs. Rules read nothing else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper, shape_inference

from service.independence.proof.extents import Dim, Extent, Unknown, varies
from service.independence.proof.refusals import SYMBOLIC_BATCH, Mixed, Unproven
from service.independence.proof.values import BATCH_SIZE_AS_VALUE, Fixed, Images, Sizes, Value, as_fixed, extents_of

Result = Value | tuple[Value, ...]
Enter = Callable[[onnx.GraphProto, Sequence[Value]], tuple[Value, ...]]


@dataclass(frozen=True, slots=True)
class Call:
    """A node with its inputs resolved; `inputs` holds None for an optional input that is left out."""

    node: onnx.NodeProto
    opset: int
    inputs: tuple[Value | None, ...]
    attributes: Mapping[str, Any]
    wanted: tuple[bool, ...]
    """For each output, whether anything that reaches a result of the graph reads it."""
    enter: Enter
    """Interprets a nested graph on these inputs; it sees the tensors around the node."""

    @property
    def operator(self) -> str:
        """The operator's name, without its domain."""
        return str(self.node.op_type)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default."""
        return self.attributes.get(name, default)

    def get(self, index: int) -> Value | None:
        """An input, or None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def operand(self, index: int) -> Value:
        """An input that must be there."""
        value = self.get(index)
        if value is None:
            raise Unproven(f"lacks its input {index}")
        return value

    def images(self, index: int = 0) -> Images:
        """An input that must carry images."""
        value = self.operand(index)
        if isinstance(value, Images):
            return value
        as_fixed(value)  # a batch size or slot number here is a sharper reason than the one below
        raise Unproven(f"carries images in a parameter but not in its input {index}")

    def fixed(self, index: int) -> Fixed | None:
        """A parameter that must be the same for every batch; None where it is left out."""
        value = self.get(index)
        return None if value is None else as_fixed(value)

    def only_first(self) -> Images:
        """The first input, which carries images; all others must be the same for every batch."""
        for index in range(1, len(self.inputs)):
            self.fixed(index)
        return self.images()

    def extents(self, index: int) -> list[Extent]:
        """A one-dimensional parameter that gives sizes or positions, as extents."""
        value = self.operand(index)
        if isinstance(value, Images):
            raise Mixed("takes a size or a position from the images' content")
        items = None if not isinstance(value, Fixed | Sizes) else extents_of(value)
        if items is None:
            raise Unproven(f"takes sizes from its input {index}, which could not be followed")
        return list(items.flat)

    def numbers(self, name: str, index: int) -> list[int] | None:
        """Known integers from the attribute of this name or, in later opsets, from the input at `index`."""
        if name in self.attributes:
            value = self.attributes[name]
            return [value] if isinstance(value, int) else list(value)
        if self.get(index) is None:
            return None
        found = [number(item) for item in self.extents(index)]
        if None in found:
            raise Unproven(f"takes {name} from its input {index}, whose value is not constant")
        return [item for item in found if item is not None]


Rule = Callable[[Call], Result]
Table = dict[tuple[str, str], Rule]
"""Rules by domain and operator; the domain of ONNX itself is empty."""


def number(extent: Extent) -> Dim:
    """A per-image extent: None where unknown, refused where it depends on the batch size."""
    if varies(extent):
        raise Mixed(BATCH_SIZE_AS_VALUE, SYMBOLIC_BATCH)
    return None if isinstance(extent, Unknown) else int(extent)  # type: ignore[arg-type]


def axis_of(axis: int, rank: int) -> int:
    """The axis counted from the front."""
    if not -rank <= axis < rank:
        raise Unproven(f"names axis {axis} of a tensor of rank {rank}")
    return axis % rank


def infer_share(call: Call, operator: str, inputs: Sequence[Value | None]) -> tuple[Dim, ...]:
    """The first output's shape in a batch of one, from ONNX's own shape inference for `operator`."""
    schema = onnx.defs.get_schema(operator, call.opset, "")
    names = ["" if value is None else f"i{index}" for index, value in enumerate(inputs)]
    known = {name: value for name, value in call.attributes.items() if name in schema.attributes}
    node = helper.make_node(operator, names, ["o"], **known)
    types = {f"i{index}": _type(value) for index, value in enumerate(inputs) if value is not None}
    try:
        found = shape_inference.infer_node_outputs(schema, node, types)["o"]
    except (
        KeyError,
        RuntimeError,
        ValueError,
        onnx.defs.SchemaError,
        shape_inference.InferenceError,
    ) as error:
        raise Unproven(f"has inputs whose shapes do not fit: {str(error).splitlines()[0]}") from error
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in found.tensor_type.shape.dim)


def _type(value: Value) -> onnx.TypeProto:
    shape = value.share if isinstance(value, Images) else as_fixed(value).shape
    # Shape inference wants some element type and does not look at which.
    return helper.make_tensor_type_proto(TensorProto.FLOAT, shape)
