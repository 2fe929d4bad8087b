"""Reads an ONNX graph into a `network`: its steps in order, and which nodes each step stands for."""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, shape_inference

from service.manifest import KeptRecord
from training.folding.algebra import Affine
from training.folding.graph_constants import FEW, FLOATS, Constants, names_read_inside
from training.folding.graph_operators import Call, read_node
from training.folding.network import Account, Layer, Other, Rescale, Step, Value
from training.folding.passages import Shape

GIVEN_APART = 4  # from this IR version on, an initializer need not be an input too
FLOAT16_MAX, FLOAT32_MAX = (float(np.finfo(dtype).max) for dtype in (np.float16, np.float32))


@dataclass(slots=True)
class Read:
    """One graph as a network. `nodes` has, by step, the nodes of the file that it stands for, in order."""

    graph: GraphProto
    constants: Constants
    types: dict[str, int]
    all_nodes: list[NodeProto]  # held, for their identity lasts only as long as somebody holds them
    values: dict[str, Value] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    nodes: dict[Step, list[NodeProto]] = field(default_factory=dict)
    kept: list[KeptRecord] = field(default_factory=list)


def infer_shapes(model: ModelProto) -> ModelProto:
    """Return the graph with the shapes that ONNX can infer, as they are where it cannot, and without large weights.

    Large weights tell no shape but their own, and inference would copy them several times.
    """
    light = _light(model)
    try:
        return shape_inference.infer_shapes(light, data_prop=True)
    except Exception:  # noqa: BLE001 - ONNX raises types of its own; without shapes less is folded, nothing wrongly
        return light


def _light(model: ModelProto) -> ModelProto:
    """Return a copy in which large weights of the main graph are inputs of their type and shape."""
    light, source = ModelProto(ir_version=max(model.ir_version, GIVEN_APART)), model.graph
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    for name in ("node", "input", "output", "value_info"):
        getattr(graph, name).extend(getattr(source, name))
    known = {entry.name for entry in source.input}
    for tensor in source.initializer:
        if tensor.data_type not in FLOATS or math.prod(tensor.dims) <= FEW:
            graph.initializer.append(tensor)
        elif tensor.name not in known:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light


def read_graph(graph: GraphProto, shaped: GraphProto, constants: Constants, opset: int, outer: Read | None) -> Read:
    """Read one graph; `shaped` is the same graph with inferred shapes, `outer` the graph around it.

    Raises NotFoldable for a BatchNorm that must not be trusted.
    """
    infos = {info.name: info for group in (shaped.value_info, shaped.input, shaped.output) for info in group}
    types = (outer.types if outer else {}) | {name: info.type.tensor_type.elem_type for name, info in infos.items()}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    read = Read(graph, constants, types, list(graph.node))
    shapes = {name: _shape(info) for name, info in infos.items()}

    def value(name: str) -> Value:
        return read.values.setdefault(name, Value(name, shapes.get(name)))

    used = Counter(name for node in graph.node for name in node.input)
    used.update(names_read_inside(graph.node))
    used.update(output.name for output in graph.output)
    for node in read.all_nodes:
        if not constants.has(node.output[0]):
            call = Call(
                node, opset, constants, value, lambda name: _limit(types.get(name)), lambda name: not used[name]
            )
            _add(read, read_node(call), node)
    for name in [*(output.name for output in graph.output), *names_read_inside(graph.node)]:
        if name in read.values:
            read.values[name].escapes = True
    _join_neighbours(read)
    return read


def _add(read: Read, step: Step, node: NodeProto) -> None:
    read.steps.append(step)
    read.nodes[step] = [node]
    for value in step.inputs:
        value.users.append(step)
    for name in node.output:
        read.values.setdefault(name, Value(name)).producer = step
    if node.op_type == "BatchNormalization" and isinstance(step, Other):
        read.kept.append(KeptRecord(norm=step.name, reason=step.note))


def _shape(info: ValueInfoProto) -> Shape | None:
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)


def _limit(element_type: int | None) -> float:
    return FLOAT16_MAX if element_type == TensorProto.FLOAT16 else FLOAT32_MAX  # bfloat16 reaches as far


def _join_neighbours(read: Read) -> None:
    """Make one step of a MatMul with the Add of its bias, and of scales and shifts in a row."""
    for step in list(read.steps):
        before = step.inputs[0].producer if isinstance(step, Rescale) else None
        if not isinstance(step, Rescale) or before is None or not step.inputs[0].is_private:
            continue
        if isinstance(before, Layer) and _is_bias_of(step, before):
            before.bias = step.affine.over(before.outputs).shift
            _merge(read, before, step)
        elif isinstance(before, Rescale) and (
            None in (before.change.axis, step.change.axis) or before.axis == step.axis
        ):
            _extend(before, step)
            _merge(read, before, step)
            before.changed = len(read.nodes[before]) > _fewest(before, read.nodes[before])


def _is_bias_of(step: Rescale, layer: Layer) -> bool:
    """Whether a step adds a bias to a matrix product that has none."""
    rank = step.output.rank
    return (
        layer.kind == "MatMul"
        and layer.bias is None
        and step.kind == "Add"
        and rank is not None
        and step.axis == rank - 1
        and len(step.affine.shift) == layer.outputs
    )


def _extend(before: Rescale, step: Rescale) -> None:
    affine = before.affine.then(step.affine)
    before.axis = step.axis if before.axis is None else before.axis
    last, first = before.accounts[-1], step.accounts[0]
    arithmetic = "BatchNormalization" not in {last.kind.split(" ")[0], first.kind}
    if arithmetic:
        joined = Account.of(f"{last.name} + {first.name}", f"{last.kind} + {first.kind}", affine)
        before.accounts[-1] = joined
    else:
        before.accounts += step.accounts
    before.affine = Affine(affine.scale, affine.shift)
    before.notable = before.notable or step.notable


def _fewest(rescale: Rescale, nodes: list[NodeProto]) -> int:
    """Return how many nodes the step needs: one BatchNormalization, or one Mul and one Add."""
    if any(node.op_type == "BatchNormalization" for node in nodes):
        return 1
    return int((rescale.affine.scale != 1).any()) + int((rescale.affine.shift != 0).any())


def _merge(read: Read, before: Step, step: Step) -> None:
    read.nodes[before] += read.nodes.pop(step)
    read.steps.remove(step)
    before.output = step.output
    before.output.producer = before
