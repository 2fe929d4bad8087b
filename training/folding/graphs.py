"""Folding for ONNX files: who feeds whom is read from the graph, shapes are ONNX's own inference.

    ModelProto ─ graph_reading ─ network ─ absorb ─ graph_writing ─ ModelProto, and the report

Graphs inside a graph, the branches of an If and the bodies of loops, are folded too, each by itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, inliner

from service.manifest import FoldError, FoldRecord, KeptRecord
from training.errors import NotFoldable
from training.folding.absorb import Absorbed, absorb
from training.folding.algebra import Array
from training.folding.evaluation import evaluate, in_float64, random_feeds
from training.folding.graph_constants import Constants, graphs_inside, opset_of
from training.folding.graph_reading import Read, infer_shapes, read_graph
from training.folding.graph_writing import Names, Writer
from training.folding.rounding import coarsest, refuse_wrong

OLDEST_OPSET = 9  # older BatchNormalization may normalize each pixel, and older arithmetic broadcasts otherwise
INPUTS_ARE_GIVEN = 4  # from this IR version on, an initializer that is also an input is a default a caller may replace

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class FoldReport:
    """The account of a fold: what went where, what stays and why, and what it costs; None where it was not measured."""

    folds: tuple[FoldRecord, ...]
    kept: tuple[KeptRecord, ...]
    end_to_end: FoldError | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it as what `json` can write."""
        return {
            "folds": [record.model_dump(mode="json") for record in self.folds],
            "kept": [record.model_dump(mode="json") for record in self.kept],
            "end_to_end": None if self.end_to_end is None else self.end_to_end.model_dump(mode="json"),
        }


@dataclass(frozen=True, slots=True)
class FoldedGraph:
    """A folded copy of a model. `exact` has, by initializer, the folded weights before rounding."""

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


def fold_graph(model: ModelProto, feeds: Feeds | None = None) -> FoldedGraph:
    """Fold every scale and shift of a classifier that can be, and measure it; the model itself is left alone.

    Float weights of any width are folded in float64 and rounded once. What would be wrong stays, with the reason.
    Errors are measured on `feeds`, arrays by input name, or on random ones; they stay None where ONNX's reference
    cannot run the file.

    Raises NotFoldable, with the node's name and the mend, for a BatchNormalization in training mode or with numbers
    that cannot be, for a file older than opset 9, and where folded and unfolded differ by more than rounding explains.
    """
    return measure(model, fold_unmeasured(model), feeds)


def fold_unmeasured(model: ModelProto) -> FoldedGraph:
    """Fold as `fold_graph` does, without running anything."""
    opset = opset_of(model)
    if opset < OLDEST_OPSET:
        raise NotFoldable(f"the file is of opset {opset}; export it again with opset {OLDEST_OPSET} or newer")
    copy = inliner.inline_local_functions(model) if model.functions else _copy_of(model)
    work = _Work(copy, opset, Names(copy.graph))
    given = frozenset(entry.name for entry in copy.graph.input) if copy.ir_version >= INPUTS_ARE_GIVEN else frozenset()
    _fold(work, copy.graph, infer_shapes(copy).graph, given, None)
    report = FoldReport(tuple(work.folds), tuple(work.kept))
    return FoldedGraph(copy, report, work.exact, tuple(work.witnesses))


def _copy_of(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


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
    is_main = outer is None
    as_inputs = is_main and work.model.ir_version < INPUTS_ARE_GIVEN
    writer = Writer(read, work.names, is_main=is_main, as_inputs=as_inputs)
    writer.write()
    work.folds += outcome.records()
    work.kept += [*read.kept, *outcome.kept]
    work.exact |= writer.exact
    work.witnesses += [absorbed.witness.stands_for if is_main else "" for absorbed in outcome.absorbed]


def measure(model: ModelProto, folded: FoldedGraph, feeds: Feeds | None = None) -> FoldedGraph:
    """Run a model and its folded form, and return the latter with every error in its report.

    In float64 the folded weights are those before rounding, so what is seen there is the algebra alone. Nothing is run
    where nothing was folded. Raises NotFoldable where it is off by more than rounding explains.
    """
    if folded.model == model:
        return folded
    try:
        given = random_feeds(model) if feeds is None else dict(feeds)
        wide = {
            name: values.astype(np.float64) if values.dtype.kind == "f" else values for name, values in given.items()
        }
        wanted, found = evaluate(in_float64(model), wide), evaluate(in_float64(folded.model, folded.exact), wide)
        plain, rounded = evaluate(model, given), evaluate(folded.model, given)
    except Exception:  # noqa: BLE001 - the reference raises whatever NumPy does; then nothing is claimed
        return folded
    outputs = [entry.name for entry in model.graph.output]
    end_to_end = FoldError(
        float64=max(_difference(found[name], wanted[name]) for name in outputs),
        float32=max(_difference(rounded[name], wanted[name]) for name in outputs),
        float32_unfolded=max(_difference(plain[name], wanted[name]) for name in outputs),
    )
    errors = [_difference(found[name], wanted[name]) if name else None for name in folded.witnesses]
    folds = tuple(
        record.model_copy(update={"error": error}) for record, error in zip(folded.report.folds, errors, strict=True)
    )
    own = coarsest(plain.values())
    for record, name in zip(folds, folded.witnesses, strict=True):
        if name and record.error is not None:
            refuse_wrong(record.norm, record.error, _difference(plain[name], wanted[name]), own)
    refuse_wrong("the whole network", end_to_end.float64, end_to_end.float32_unfolded, own)
    return replace(folded, report=FoldReport(folds, folded.report.kept, end_to_end))


def _difference(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return the largest difference over the largest magnitude."""
    scale = max(float(np.abs(wanted).max(initial=0)), float(np.finfo(np.float64).tiny))
    return float(np.abs(np.asarray(found, np.float64) - wanted).max(initial=0)) / scale
