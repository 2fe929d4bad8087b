"""The changes to a foreign graph, one at a time, on a copy: head, batch, entry. Each leaves what it computes alone."""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from service.artifact import INPUT_NAME, OUTPUT_NAME
from service.preprocessing import Preprocessing
from training.errors import FileRefused
from training.folding.graph_constants import Constants, graphs_inside, names_read_inside
from training.foreign.read import inputs_of
from training.importing.interface import Interface

BATCH = "batch"
TO_PLANES = [0, 3, 1, 2]
PREFIX = "foldserve"  # of the names that are put in; a graph that has them already was imported before


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose one input is the images, without the exporter's notes, which may tell of its machine."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    wanted = inputs_of(graph)
    del graph.input[:]
    graph.input.extend(wanted)
    copy.ir_version = max(copy.ir_version, 4)  # before 4 every initializer had to be an input too
    for group in (graph.node, graph.value_info, graph.input, graph.output, graph.initializer):
        for entry in group:
            del entry.metadata_props[:]
            entry.doc_string = ""
    del graph.metadata_props[:]
    del copy.metadata_props[:]
    copy.doc_string = graph.doc_string = ""
    return copy


def without_softmax(model: onnx.ModelProto) -> str | None:
    """Take a final softmax off, in place; return what was taken off. The artifact's output is logits."""
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    last = producers[graph.output[0].name]
    while last.op_type == "Identity" and last.input[0] in producers:
        last = producers[last.input[0]]
    if last.op_type not in ("Softmax", "LogSoftmax"):
        return None
    taken = str(last.op_type)
    last.op_type = "Identity"
    del last.attribute[:]
    return taken


def open_batch(model: onnx.ModelProto, interface: Interface) -> int:
    """Make the batch symbolic, in place; return how many Reshape targets had the old size written in."""
    graph = model.graph
    given = next(value for value in graph.input if value.name == interface.input_name)
    given.type.tensor_type.shape.dim[0].dim_param = BATCH
    for output in graph.output:
        output.type.tensor_type.shape.dim[0].dim_param = BATCH
    del graph.value_info[:]
    return 0 if interface.batch is None else _free_reshapes(graph, interface.batch, Constants.of(model))


def _free_reshapes(graph: onnx.GraphProto, batch: int, known: Constants) -> int:
    """A target [B, 2048] becomes [−1, 2048], a target [B, −1] becomes [0, −1]: 0 copies the axis (Reshape-5)."""
    changed = 0
    for node in graph.node:
        target = known.integers(node.input[1]) if node.op_type == "Reshape" else None
        if target and target[0] == batch:
            first = 0 if -1 in target[1:] or 0 in target[1:] else -1
            name = f"{PREFIX}_target_{node.output[0]}"
            values = np.array([first, *target[1:]], np.int64)
            graph.initializer.append(numpy_helper.from_array(values, name))
            node.input[1] = name
            changed += 1
    return changed


def with_entry(model: onnx.ModelProto, interface: Interface, spec: Preprocessing) -> onnx.ModelProto:
    """Return a copy that takes uint8 `image` (batch, height, width, channels): transpose → cast → subtract → multiply.

    A model that takes pixels already gets no arithmetic, for it has its own.
    """
    model = copy_of(model)
    graph = model.graph
    given = next(value for value in graph.input if value.name == interface.input_name)
    if given.name != INPUT_NAME and INPUT_NAME in {name for node in graph.node for name in (*node.input, *node.output)}:
        raise FileRefused(f"a tensor inside the graph is called {INPUT_NAME}; rename it and try again")
    nodes, consumer = _entry_nodes(model, interface, spec)
    _read_instead(graph.node, given.name, consumer)
    graph.input.remove(given)
    shape: list[str | int | None] = [BATCH, *spec.size, spec.channels]
    graph.input.insert(0, helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, shape))
    rest = [node for node in graph.node if not (_is_to_planes(node) and node.input[0] == f"{PREFIX}_planes_first")]
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    del graph.value_info[:]
    return model


def _read_instead(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    """Let everything that reads `old` read `new`, branches and loop bodies too; ONNX lets no name mean two things."""
    for node in nodes:
        node.input[:] = [new if name == old else name for name in node.input]
        for inner in graphs_inside([node]):
            _read_instead(inner.node, old, new)


def _entry_nodes(model: onnx.ModelProto, interface: Interface, spec: Preprocessing) -> tuple[list[onnx.NodeProto], str]:
    """Return the nodes that go in, and the name that takes the old input's place."""
    graph = model.graph
    readers = [node for node in graph.node if interface.input_name in (*node.input, *names_read_inside([node]))]
    skips = interface.channels_last and len(readers) == 1 and _is_to_planes(readers[0])  # Keras: its own transpose
    planes_first = skips or not interface.channels_last
    nodes, last = [], INPUT_NAME
    if planes_first:
        nodes.append(helper.make_node("Transpose", [last], [f"{PREFIX}_planes"], f"{PREFIX}_planes", perm=TO_PLANES))
        last = f"{PREFIX}_planes"
    if not interface.takes_bytes:
        nodes += _arithmetic(graph, last, spec, planes_first=planes_first)
        last = f"{PREFIX}_standardised"
    if not skips:
        return nodes, last
    for node in graph.node:
        node.input[:] = [last if name == readers[0].output[0] else name for name in node.input]
    return nodes, f"{PREFIX}_planes_first"  # what only the old transpose reads; it goes


def _arithmetic(graph: onnx.GraphProto, last: str, spec: Preprocessing, *, planes_first: bool) -> list[onnx.NodeProto]:
    shape = (1, -1, 1, 1) if planes_first else (1, 1, 1, -1)
    mean = (255 * np.array(spec.mean)).astype(np.float32).reshape(shape)
    scale = (1 / (255 * np.array(spec.std))).astype(np.float32).reshape(shape)
    graph.initializer.append(numpy_helper.from_array(mean, f"{PREFIX}_mean"))
    graph.initializer.append(numpy_helper.from_array(scale, f"{PREFIX}_scale"))
    names = [f"{PREFIX}_{name}" for name in ("floats", "centred", "standardised")]
    return [
        helper.make_node("Cast", [last], [names[0]], names[0], to=TensorProto.FLOAT),
        helper.make_node("Sub", [names[0], f"{PREFIX}_mean"], [names[1]], names[1]),
        helper.make_node("Mul", [names[1], f"{PREFIX}_scale"], [names[2]], names[2]),
    ]


def _is_to_planes(node: onnx.NodeProto) -> bool:
    perm = next((list(one.ints) for one in node.attribute if one.name == "perm"), [])
    return node.op_type == "Transpose" and perm == TO_PLANES


def name_output(model: onnx.ModelProto, interface: Interface) -> None:
    """Make the output float32 `logits` (batch, classes), in place; a head of shape (…, 1, 1) is flattened."""
    graph = model.graph
    output = graph.output[0]
    rank = len(output.type.tensor_type.shape.dim)
    kind = "Identity" if rank == 2 else "Flatten"
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    if OUTPUT_NAME in taken and output.name != OUTPUT_NAME:
        raise FileRefused(f"a tensor inside the graph is called {OUTPUT_NAME}; rename it, or the output, and try again")
    if output.name != OUTPUT_NAME or rank != 2:
        _rename(graph, output.name, f"{PREFIX}_scores")
        graph.node.append(helper.make_node(kind, [f"{PREFIX}_scores"], [OUTPUT_NAME], f"{PREFIX}_logits"))
    graph.output.remove(output)
    graph.output.append(helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, [BATCH, interface.classes]))


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def with_output_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the shapes of its outputs inferred, where the file leaves them out."""
    shapes = [output.type.tensor_type.shape.dim for output in model.graph.output]
    if all(len(shape) >= 2 and shape[1].dim_value for shape in shapes):
        return model
    return shape_inference.infer_shapes(model)
