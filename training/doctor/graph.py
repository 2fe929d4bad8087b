"""The checks on an ONNX graph: modes, batch statistics, what stands before each BatchNorm, the batch dimension."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.artifact import stored_tensors
from service.independence.proof import prove
from service.independence.proof.verdict import OPSETS
from service.wording import counted
from training.doctor.findings import Finding, finding
from training.doctor.norms import Layer
from training.errors import NotFoldable
from training.folding.graph_constants import Constants, graphs_inside, opset_of
from training.folding.graphs import fold_unmeasured
from training.foreign.read import inputs_of
from training.foreign.settling import names_apart

FLOAT16_MAX = 65504.0
LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm"})
TRANSPARENT = frozenset({"Identity", "Cast"})


def norm_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the BatchNormalization nodes of the main graph, in order."""
    return [node for node in graph.node if node.op_type == "BatchNormalization"]


def nested_norms(graph: onnx.GraphProto, known: Constants, opset: int) -> Iterator[tuple[onnx.NodeProto, Constants]]:
    """Yield the BatchNormalization nodes of the branches and loops in a graph, at any depth, and what they can read."""
    for part in graphs_inside(graph.node):
        inner = Constants(part, opset, frozenset(entry.name for entry in part.input), known)
        yield from ((node, inner) for node in norm_nodes(part))
        yield from nested_norms(part, inner, opset)


def training_norms(model: onnx.ModelProto) -> list[str]:
    """Return the BatchNormalization nodes in training mode, wherever they lie."""
    opset = opset_of(model)
    nested = (node for node, _ in nested_norms(model.graph, Constants.of(model), opset))
    return [node_name(node) for node in chain(norm_nodes(model.graph), nested) if _trains(node, opset)]


def node_name(node: onnx.NodeProto) -> str:
    """Return what people call a node: its name, else its first output."""
    return node.name or node.output[0]


def norm_names(graph: onnx.GraphProto) -> list[str]:
    """Return a name for each of `norm_nodes`: the one that it has in the settled graph, too."""
    named = zip(graph.node, names_apart(graph), strict=True)
    return [name for node, name in named if node.op_type == "BatchNormalization"]


def layer_of(node: onnx.NodeProto, known: Constants) -> Layer:
    """Return the numbers of a BatchNormalization node; what the file does not fix is None.

    The attribute `momentum` is not believed: exporters write it whatever the training was (ONNX's is the decay).
    """
    stored = known.tensor(node.input[4])
    mean, var, weight, bias = (known.floats(node.input[index]) for index in (3, 4, 1, 2))
    return Layer(
        node_name(node),
        running_mean=mean,
        running_var=var,
        weight=weight,
        bias=bias,
        eps=float(attribute(node, "epsilon", 1e-5)),
        stored_as="float32" if stored is None else str(helper.tensor_dtype_to_np_dtype(stored.data_type)),
    )


def attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    """Return a number attribute of a node, or its default."""
    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def examine_graph(model: onnx.ModelProto) -> Iterator[Finding]:
    """Yield what the graph shows."""
    yield from _modes(model)
    yield from _mixing(model)
    yield from _unknown(model)
    yield from _neighbours(model)
    yield from _shared(model)
    yield from _frame(model)


def damaged_weights(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the stored tensors that hold NaN or Inf; −Inf alone is a mask's, and is left out.

    What a BatchNorm of the main graph reads is left out too: it is looked at as that layer's.
    """
    of_norms = {name for node in norm_nodes(model.graph) for name in node.input[1:]}
    damaged = (tensor for tensor in stored_tensors(model) if tensor.name not in of_norms and _is_damaged(tensor))
    return tuple(tensor.name or "a constant" for tensor in damaged)


def _is_damaged(tensor: TensorProto) -> bool:
    if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
        return False
    values = numpy_helper.to_array(tensor)
    return bool(np.isnan(values).any() or (values.size > 1 and np.isposinf(values).any()))


def _modes(model: onnx.ModelProto) -> Iterator[Finding]:
    training = training_norms(model)
    if training:
        yield finding("training-mode", counted(len(training), "BatchNormalization node"), training)
    known = Constants.of(model)
    dropping = [node_name(node) for node in model.graph.node if node.op_type == "Dropout" and _drops(node, known)]
    if dropping:
        yield finding("active-dropout", counted(len(dropping), "Dropout node"), dropping)


def _trains(node: onnx.NodeProto, opset: int) -> bool:
    """From opset 14 the attribute tells; before, more outputs than one do (BatchNormalization-9, outputs)."""
    return attribute(node, "training_mode", 0) == 1 or (opset < 14 and len([one for one in node.output if one]) > 1)


def _drops(node: onnx.NodeProto, known: Constants) -> bool:
    """From opset 12 an input tells (Dropout-12, training_mode)."""
    mode = known.array(node.input[2]) if len(node.input) > 2 else None
    return mode is not None and bool(mode.any())


def _mixing(model: onnx.ModelProto) -> Iterator[Finding]:
    known = Constants.of(model)
    computed = [node_name(node) for node in norm_nodes(model.graph) if not all(map(known.has, node.input[3:5]))]
    if computed:
        yield finding("batch-statistics", "mean or variance are computed by the graph", computed)
        return
    if any(_modes(model)) or len(inputs_of(model.graph)) != 1:
        return
    verdict = prove(model)
    where = [verdict.node] if verdict.node else []
    if verdict.verdict == "mixed":
        yield finding("batch-statistics", verdict.reason, where)
    elif verdict.verdict == "unproven" and (where or opset_of(model) in OPSETS):  # else `_frame` tells of the opset
        yield finding("unproven", verdict.reason, where)


def _unknown(model: onnx.ModelProto) -> Iterator[Finding]:
    """Look for statistics that no constant fixes, where `_mixing` has not: it knows the main graph alone."""
    known, opset = Constants.of(model), opset_of(model)
    main = ((node, known) for node in norm_nodes(model.graph) if all(map(known.has, node.input[3:5])))
    each = (one for one in chain(main, nested_norms(model.graph, known, opset)) if not _trains(one[0], opset))
    unknown = [node_name(node) for node, inner in each if any(inner.floats(name) is None for name in node.input[3:5])]
    if unknown:
        yield finding("unknown-statistics", "mean or variance are no constants of the file", unknown)


def _neighbours(model: onnx.ModelProto) -> Iterator[Finding]:
    """Look at what feeds each BatchNorm."""
    producers = {output: node for node in model.graph.node for output in node.output}
    known = Constants.of(model)
    found = defaultdict(list)
    found["unfolded"] = _foldable(model)
    for node in norm_nodes(model.graph):
        before = _producer(producers, node.input[0])
        if before is None:
            continue
        if before.op_type in LINEAR and len(before.input) > 2 and _is_some(known, before.input[2]):
            found["bias-before"].append(node_name(node))
        if before.op_type == "Dropout":
            found["dropout-before"].append(node_name(node))
    for check, names in ((check, names) for check, names in found.items() if names):
        yield finding(check, f"{len(names)} of {counted(len(norm_nodes(model.graph)), 'BatchNorm')}", names)


def _foldable(model: onnx.ModelProto) -> list[str]:
    """Return the BatchNorms that folding would take away; none where it refuses the file for what others say."""
    try:
        report = fold_unmeasured(model).report
    except NotFoldable:
        return []
    gone = {record.norm for record in report.folds if record.norm_kind == "BatchNormalization"}
    return [node_name(node) for node in norm_nodes(model.graph) if node_name(node) in gone]


def _is_some(known: Constants, name: str) -> bool:
    """Exporters write a missing bias as zeros."""
    values = known.array(name)
    return values is not None and bool(np.any(values))


def _producer(producers: dict[str, onnx.NodeProto], name: str) -> onnx.NodeProto | None:
    node = producers.get(name)
    while node is not None and node.op_type in TRANSPARENT:
        node = producers.get(node.input[0])
    return node


def _shared(model: onnx.ModelProto) -> Iterator[Finding]:
    readers = defaultdict(list)
    for node in norm_nodes(model.graph):
        for name in set(node.input[3:5]):
            readers[name].append(node_name(node))
    shared = {name: nodes for name, nodes in readers.items() if len(nodes) > 1}
    if shared:
        name, nodes = next(iter(shared.items()))
        yield finding("shared-statistics", f"{name} is read by {', '.join(nodes)}", sorted({*chain(*shared.values())}))


def _frame(model: onnx.ModelProto) -> Iterator[Finding]:
    for value in inputs_of(model.graph)[:1]:
        first = next(iter(value.type.tensor_type.shape.dim), None)
        if first is not None and first.dim_value > 0:
            yield finding(
                "fixed-batch",
                f"the input {value.name} holds {counted(first.dim_value, 'image')}",
                (value.name,),
            )
    if opset_of(model) not in OPSETS:
        yield finding("opset", f"opset {opset_of(model)}")
    large = {
        tensor.name: peak
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and FLOAT16_MAX < (peak := _peak(tensor)) < np.inf
    }
    if large:
        yield finding("overflow", f"largest {max(large.values()):.3g}", large)


def _peak(tensor: TensorProto) -> float:
    return float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))
