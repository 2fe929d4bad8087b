"""Settles what a foreign graph leaves open though the file fixes it: constants still to be computed, types by example.

Exporters without their optimizer write weights that are standardised inside the graph, and casts "like" another
tensor. Runtimes work both out when they load a file; the doctor, the proof and the folding want them worked out.
"""

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, inliner, numpy_helper

from training.folding.evaluation import evaluate
from training.folding.graph_constants import graphs_inside, names_read_inside, room_for
from training.folding.graph_reading import infer_shapes
from training.foreign.read import LARGEST_BYTES, inputs_of

CHANCE = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def settle(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which no node computes from constants alone, and no cast takes its type from a tensor.

    Functions of the file's own are written out, and nodes that share a name are called as their outputs.
    Constants are computed by ONNX's reference in the precision that the file has, as a runtime does. What cannot be
    computed so stays, and what takes far more memory than the file, or nobody knows how much: a few bytes can ask for
    any number of them. So does everything where the copy would be too large for one file.
    """
    settled = onnx.ModelProto()
    settled.CopyFrom(inliner.inline_local_functions(model) if model.functions else model)
    _name_apart(settled.graph)
    _name_types(settled)
    _compute_constants(settled)
    return settled


def names_apart(graph: onnx.GraphProto) -> list[str]:
    """Return what to call each node: its name, or its first output where it has none or shares it with any other."""
    count = Counter(node.name for node in graph.node)
    return [
        node.name if node.name and count[node.name] == 1 else next(iter(node.output), node.op_type)
        for node in graph.node
    ]


def _name_apart(graph: onnx.GraphProto) -> None:
    for node, name in zip(graph.node, names_apart(graph), strict=True):
        if node.name:
            node.name = name


def _name_types(model: onnx.ModelProto) -> None:
    """CastLike reads only the type of its second input."""
    likes = [node for node in model.graph.node if node.op_type == "CastLike"]
    if not likes:
        return
    graph = infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in likes:
        if kind := types.get(node.input[1], TensorProto.UNDEFINED):
            node.op_type = "Cast"
            del node.input[1:]
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("to", kind))


def _compute_constants(model: onnx.ModelProto) -> None:
    graph = model.graph
    fixed, rest = _split(model)
    if not any(node.op_type != "Constant" for node in fixed):
        return
    outputs = {value.name for value in graph.output}
    wanted = {name for node in rest for name in _read_by(node)} | outputs
    try:
        values = _values(model, fixed)
    except Exception:  # noqa: BLE001 - the reference raises whatever NumPy does; then the graph stays as it is
        return
    needed = {name: np.asarray(value) for name, value in values.items() if name in wanted}
    read = wanted | {value.name for value in graph.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    size = sum(part.ByteSize() for part in (*rest, *kept)) + sum(value.nbytes for value in needed.values())
    if outputs & set(needed) or size > LARGEST_BYTES:
        return
    del graph.node[:], graph.initializer[:]
    graph.node.extend(rest)
    graph.initializer.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in needed.items())


def _split(model: onnx.ModelProto) -> tuple[list[NodeProto], list[NodeProto]]:
    """Return the nodes to compute from nothing but constants, and the others; ONNX lists nodes in order of use."""
    graph, sizes = model.graph, _sizes(model)
    room: float = room_for(graph)
    open_inputs = {value.name for value in inputs_of(graph)}
    known = {tensor.name for tensor in graph.initializer} - open_inputs
    fixed, rest = [], []
    for node in graph.node:
        can_be = node.domain in ("", "ai.onnx") and node.op_type not in CHANCE and not any(graphs_inside([node]))
        needs = 0 if node.op_type == "Constant" else sum(sizes.get(name, math.inf) for name in node.output if name)
        if can_be and needs <= room and all(name in known for name in node.input if name):
            room -= needs
            fixed.append(node)
            known.update(node.output)
        else:
            rest.append(node)
    return fixed, rest


def _sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Return the bytes of every value whose shape can be told without computing it."""
    found = {}
    for value in infer_shapes(model).graph.value_info:
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            width = helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            found[value.name] = width * math.prod(dim.dim_value for dim in tensor.shape.dim)
    return found


def _values(model: onnx.ModelProto, nodes: list[NodeProto]) -> dict[str, np.ndarray]:
    read = {name for node in nodes for name in node.input}
    part = onnx.ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    return evaluate(part, {})


def _read_by(node: NodeProto) -> Iterator[str]:
    yield from node.input
    yield from names_read_inside([node])
