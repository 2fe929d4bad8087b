"""The static proof that no operator of an ONNX graph mixes images.

An abstract interpretation: every tensor is Fixed, Sizes, Slots or Images (see `values`), the input is Images
on axis 0, and each operator has a rule that says what its results are. Where the outputs come out as Images
on axis 0, one row an image, image i's answer is a function of image i's pixels alone, for every batch size.
This is about what the operators mean; how kernels round is for the probe to measure. Reads the graph only:
weights need not be there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import onnx

from service.independence.proof.call import Rule
from service.independence.proof.extents import Dim
from service.independence.proof.refusals import SYMBOLIC_BATCH, Mixed, Refusal, Unproven
from service.independence.proof.rules import RULES
from service.independence.proof.values import Images, Value
from service.independence.proof.walk import Walk

OPSETS = range(9, 24)
"""The versions of ONNX's operators that the rules were written for and tested with."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the proof found; `node` is the node's own name in the file, or its operator and first output."""

    verdict: Literal["independent", "mixed", "unproven"]
    node: str
    operator: str
    reason: str
    remedy: str
    nodes_seen: int


def prove(model: onnx.ModelProto, rules: Mapping[tuple[str, str], Rule] = RULES) -> Verdict:
    """Say whether each image's results depend on that image alone, whatever the batch.

    The model has one input (besides those with initial values), whose axis 0 is the batch, symbolic or not;
    each output must hold one row an image. Stops at the first node that mixes images or cannot be followed.
    """
    walk = Walk(model, rules)
    try:
        name, images = _input_images(model.graph)
        outputs = walk.graph(model.graph, {name: images}, walk.around)
        for output, value in zip(model.graph.output, outputs, strict=True):
            _check_output(model.graph, output.name, value)
        _check_opsets(walk.opsets)
    except Refusal as refusal:
        return _refused(refusal, walk.visited)
    reason = f"each of the {walk.visited} nodes computes an image's results from that image alone"
    return Verdict("independent", "", "", reason, "", walk.visited)


def _refused(refusal: Refusal, visited: int) -> Verdict:
    node = refusal.node
    name = "" if node is None else node.name or f"{node.op_type} {node.output[0]}"
    operator = "" if node is None else node.op_type
    where = f"node {name} ({operator}) " if name else "the graph "
    word: Literal["mixed", "unproven"] = "mixed" if isinstance(refusal, Mixed) else "unproven"
    return Verdict(word, name, operator, where + refusal.reason, refusal.remedy, visited)


def _input_images(graph: onnx.GraphProto) -> tuple[str, Images]:
    given = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in given]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise Unproven(f"must have one input, the images, but has {len(inputs)}: {names}", "make the others constants")
    kind = inputs[0].type.tensor_type
    if not kind.HasField("shape") or not kind.shape.dim:
        raise Unproven(f"does not say how many axes its input {inputs[0].name} has", SYMBOLIC_BATCH)
    batch, *rest = kind.shape.dim
    if batch.dim_param and batch.dim_param in (dim.dim_param for dim in rest):
        raise Unproven(f"names another axis of its input like the batch, {batch.dim_param}", SYMBOLIC_BATCH)
    return inputs[0].name, Images(0, (1, *(_dim(dim) for dim in rest)), outer=1)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    return dim.dim_value if dim.dim_value > 0 else None


def _check_output(graph: onnx.GraphProto, name: str, value: Value) -> None:
    refusal: Refusal
    if not isinstance(value, Images):
        refusal = Unproven(f"makes the output {name}, which has no batch axis", "drop that output")
    elif value.axis != 0:
        refusal = Mixed(f"makes the output {name} with the batch on axis {value.axis}: its rows are not images")
    elif value.rows != 1:
        refusal = Unproven(f"makes the output {name} with {value.rows} rows an image", "reshape it to one row an image")
    else:
        return
    refusal.node = next((node for node in graph.node if name in node.output), None)
    raise refusal


def _check_opsets(opsets: set[int]) -> None:
    """Last, so that a file that mixes images is told so whatever its opset."""
    for opset in opsets.difference(OPSETS):
        reason = f"uses opset {opset}; the rules are for {OPSETS.start} to {OPSETS.stop - 1}"
        raise Unproven(reason, "convert it with onnx.version_converter")
