"""Folding for ONNX files: who feeds whom is read from the graph, shapes are ONNX's own inference.

    ModelProto ─ graph_reading ─ network ─ absorb ─ graph_writing ─ ModelProto, and the report

Graphs inside a graph, the branches of an If and the bodies of loops, are folded too, each by itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onnx import GraphProto, ModelProto, inliner

from service.artifact import FoldRecord, KeptRecord
from training.errors import NotFoldable
from training.folding.absorb import Absorbed, absorb
from training.folding.algebra import Array
from training.folding.graph_constants import Constants, graphs_inside
from training.folding.graph_reading import Read, infer_shapes, opset_of, read_graph
from training.folding.graph_writing import Names, Writer

OLDEST_OPSET = 9  # older BatchNormalization may normalize each pixel, and older arithmetic broadcasts otherwise
INPUTS_ARE_GIVEN = 4  # from this IR version on, an initializer that is also an input is a default a caller may replace


@dataclass(frozen=True, slots=True)
class FoldReport:
    """The account of a fold: what went where, what stays and why."""

    folds: tuple[FoldRecord, ...]
    kept: tuple[KeptRecord, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it as what `json` can write."""
        return {
            "folds": [record.model_dump(mode="json") for record in self.folds],
            "kept": [record.model_dump(mode="json") for record in self.kept],
        }


@dataclass(frozen=True, slots=True)
class FoldedGraph:
    """A folded copy of a model. `exact` has, by initializer of its graph, the folded weights before rounding."""

    model: ModelProto
    report: FoldReport
    exact: Mapping[str, Array] = field(repr=False)
    witnesses: tuple[str, ...]  # for each fold, a value of both models that comes right after it; "" for none


@dataclass(slots=True)
class _Work:
    """One model on its way."""

    model: ModelProto
    opset: int
    names: Names
    absorbed: list[Absorbed] = field(default_factory=list)
    folds: list[FoldRecord] = field(default_factory=list)
    kept: list[KeptRecord] = field(default_factory=list)
    exact: dict[str, Array] = field(default_factory=dict)
    witnesses: list[str] = field(default_factory=list)


def fold_graph(model: ModelProto) -> FoldedGraph:
    """Fold every scale and shift of a classifier that can be; the model itself is left alone.

    Float weights of any width are folded in float64 and rounded once. What would be wrong stays, with the reason.

    Raises NotFoldable, with the node's name and the mend, for a BatchNormalization in training mode or with numbers
    that cannot be, and for a file older than opset 9.
    """
    opset = opset_of(model)
    if opset < OLDEST_OPSET:
        raise NotFoldable(f"the file is of opset {opset}; export it again with opset {OLDEST_OPSET} or newer")
    copy = (
        inliner.inline_local_functions(model) if model.functions else ModelProto.FromString(model.SerializeToString())
    )
    work = _Work(copy, opset, Names(copy.graph))
    given = frozenset(entry.name for entry in copy.graph.input) if copy.ir_version >= INPUTS_ARE_GIVEN else frozenset()
    _fold(work, copy.graph, infer_shapes(copy).graph, given, None)
    report = FoldReport(tuple(work.folds), tuple(work.kept))
    return FoldedGraph(copy, report, work.exact, tuple(work.witnesses))


def _fold(work: _Work, graph: GraphProto, shaped: GraphProto, given: frozenset[str], outer: Read | None) -> None:
    """Fold one graph, after the graphs inside it."""
    constants = Constants(graph, work.opset, given, outer.constants if outer else None)
    read = read_graph(graph, shaped, constants, work.opset, outer)
    inner = list(zip(graphs_inside(graph.node), graphs_inside(shaped.node), strict=True))
    for part, shaped_part in inner:
        _fold(work, part, shaped_part, frozenset(entry.name for entry in part.input), read)
    if inner:  # they may have let go of constants of this graph
        read = read_graph(graph, shaped, constants, work.opset, outer)
    outcome = absorb(read.steps)
    writer = Writer(read, work.names, as_inputs=outer is None and work.model.ir_version < INPUTS_ARE_GIVEN)
    writer.write()
    work.folds += outcome.records()
    work.kept += [*read.kept, *outcome.kept]
    work.exact |= writer.exact if outer is None else {}
    work.witnesses += [absorbed.witness.stands_for if outer is None else "" for absorbed in outcome.absorbed]
