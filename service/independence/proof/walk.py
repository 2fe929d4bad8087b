"""The walk over a model's nodes, in order, entering nested graphs and local functions where they are called.

Knows scopes, liveness and attributes; knows no operator. A node that no output depends on is not walked: what
it computes is thrown away.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import helper

from service.independence.proof.call import Call, Rule
from service.independence.proof.refusals import Refusal, Unproven
from service.independence.proof.rules import apply
from service.independence.proof.rules.constants import from_tensor
from service.independence.proof.values import Fixed, Value

MOST_NODES = 50_000
"""Visits, calls included. Functions that call functions twice could ask for exponentially many."""
MOST_DEPTH = 64
RUNTIME_DOMAINS = ("ai.onnx", "com.microsoft", "com.ms.")
"""Where a runtime has operators of its own, which may win over a file's definition of the same name."""

Scope = dict[str, Value]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a node sees besides its inputs: opset versions, attributes of its function, depth of calls."""

    opsets: Mapping[str, int]
    given: Mapping[str, Any] = field(default_factory=dict)
    depth: int = 0


class Walk:
    """One walk over one model; `visited` counts the nodes seen, `opsets` holds the versions they were of."""

    def __init__(self, model: onnx.ModelProto, rules: Mapping[tuple[str, str], Rule]) -> None:
        self.rules = rules
        self.visited = 0
        self.opsets: set[int] = set()
        self.functions = {(_domain(f.domain), f.name, f.overload): f for f in model.functions}
        self.around = Surroundings(_opsets(model.opset_import))

    def graph(self, graph: onnx.GraphProto, scope: Scope, around: Surroundings) -> list[Value]:
        """Interpret a graph in a scope that holds its inputs; return its outputs."""
        for tensor in graph.initializer:
            scope[tensor.name] = from_tensor(tensor)
        for sparse in graph.sparse_initializer:
            scope[sparse.values.name] = Fixed(tuple(sparse.dims))
        return self.body(graph.node, [output.name for output in graph.output], scope, around)

    def body(
        self, nodes: Sequence[onnx.NodeProto], outputs: list[str], scope: Scope, around: Surroundings
    ) -> list[Value]:
        """Interpret nodes in order; return the named outputs."""
        needed = _needed(nodes, outputs)
        for node in nodes:
            if needed.intersection(node.output):
                self.step(node, scope, needed, around)
        return [_look_up(scope, name) for name in outputs]

    def step(self, node: onnx.NodeProto, scope: Scope, needed: set[str], around: Surroundings) -> None:
        """Interpret one node and put its outputs into the scope; a refusal gets the node it is about."""
        self.visited += 1
        try:
            results = self._results(node, scope, needed, around)
            _bind(scope, node.output, results)
        except Refusal as refusal:
            refusal.node = refusal.node or node
            raise
        except Exception as error:  # a malformed node may trip any rule, and must not pass for that
            refused = Unproven(f"could not be read: {error!r}", "check the file with onnx.checker")
            refused.node = node
            raise refused from error

    def _results(self, node: onnx.NodeProto, scope: Scope, needed: set[str], around: Surroundings) -> Sequence[Value]:
        if self.visited > MOST_NODES or around.depth > MOST_DEPTH:
            raise Unproven("is called too often or too deep to follow")
        inputs = tuple(_look_up(scope, name) if name else None for name in node.input)
        attributes = dict(_attributes(node, around.given))
        function = self.functions.get((_domain(node.domain), node.op_type, node.overload))
        if function is not None:
            return self._called(function, inputs, attributes, around)
        wanted = tuple(name in needed for name in node.output)
        opset = around.opsets.get("", 1)  # of ONNX itself, also for a vendor's form of one of its operators
        self.opsets.add(opset)

        def enter(graph: onnx.GraphProto, given: Sequence[Value]) -> tuple[Value, ...]:
            inner: Scope = scope | dict(zip((value.name for value in graph.input), given, strict=True))
            deeper = Surroundings(around.opsets, around.given, around.depth + 1)
            return tuple(self.graph(graph, inner, deeper))

        return apply(Call(node, opset, inputs, attributes, wanted, enter), self.rules)

    def _called(
        self,
        function: onnx.FunctionProto,
        inputs: tuple[Value | None, ...],
        given: dict[str, Any],
        around: Surroundings,
    ) -> list[Value]:
        """Interpret the body of a model-local function."""
        if not function.domain or function.domain.startswith(RUNTIME_DOMAINS):
            raise Unproven("is redefined by the file, and runtimes differ in which definition they take")
        named = zip(function.input, inputs, strict=False)
        scope = {name: value for name, value in named if value is not None}
        defaults = {proto.name: helper.get_attribute_value(proto) for proto in function.attribute_proto}
        deeper = Surroundings(_opsets(function.opset_import), defaults | given, around.depth + 1)
        return self.body(function.node, list(function.output), scope, deeper)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {_domain(entry.domain): entry.version for entry in imports}


def _look_up(scope: Scope, name: str) -> Value:
    if name not in scope:
        raise Unproven(f"reads {name!r}, which no earlier node computes", "check the file with onnx.checker")
    return scope[name]


def _bind(scope: Scope, names: Sequence[str], results: Sequence[Value]) -> None:
    for name, value in zip(names, results, strict=False):
        if name and name in scope:
            raise Unproven(f"computes {name!r} a second time", "check the file with onnx.checker")
        scope[name] = value


def _attributes(node: onnx.NodeProto, given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for proto in node.attribute:
        if not proto.ref_attr_name:
            yield proto.name, helper.get_attribute_value(proto)
        elif proto.ref_attr_name in given:
            yield proto.name, given[proto.ref_attr_name]


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> set[str]:
    """The names that reach one of the outputs."""
    needed = set(outputs)
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(_read_by(node))
    needed.discard("")
    return needed


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """The names a node reads, those that its nested graphs take from around it included."""
    yield from node.input
    for proto in node.attribute:
        for graph in (*proto.graphs, *([proto.g] if proto.HasField("g") else [])):
            for inner in graph.node:
                yield from _read_by(inner)
            yield from (output.name for output in graph.output)
