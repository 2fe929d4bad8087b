"""Folding for PyTorch modules, by traced graph: who feeds whom is read from the graph, never guessed from sizes.

A BatchNorm is folded into the convolutions or linear layers that feed it, or into those that read it, where nothing
else sees what changes. Every other BatchNorm stays, and the result says why.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from service.manifest import FoldError, FoldRecord, KeptRecord
from training.errors import NotFoldable
from training.folding.absorb import Outcome, absorb
from training.folding.algebra import Array
from training.folding.module_reading import Read, read_module
from training.folding.module_sharing import share_again, untie
from training.folding.module_tracing import trace
from training.folding.network import Layer, Rescale
from training.folding.rounding import refuse_wrong
from training.normalization import batch_norms

ANSWER = ""  # what no node is called
PIXELS_AT_ONCE = 2**18  # of images whose every activation is kept at once: five of 224 × 224


@dataclass(frozen=True, slots=True)
class Folded:
    """A classifier in float64 without the BatchNorm that could go, the same one with it, and the account of it."""

    module: fx.GraphModule
    unfolded: fx.GraphModule
    folds: tuple[FoldRecord, ...]
    kept: tuple[KeptRecord, ...]
    witnesses: tuple[tuple[str, str], ...]  # for each of `folds`, an unfolded and a folded node that answer alike
    end_to_end: FoldError | None = None  # None until it was run on data


def fold(model: nn.Module, example: Tensor | None = None) -> Folded:
    """Fold the BatchNorm of a classifier in evaluation mode; the model itself is left alone.

    `example`, images (N, channels, height, width), tells the ranks inside the network: a linear layer's BatchNorm1d is
    folded only where its input is seen to have rank 2, for on rank 3 it normalizes another axis.

    Raises NotFoldable, with the layer's name and the mend, where a BatchNorm is in training mode, keeps no running
    statistics, was never updated, or holds numbers that cannot be: those models answer wrongly, folded or not.
    """
    for name, norm in batch_norms(model):
        _refuse_untrustworthy(name, norm)
    unfolded = trace(model, example)
    module = copy.deepcopy(unfolded)
    shared = untie(module)
    read = read_module(module)
    outcome = absorb(read.steps)
    share_again(module, shared, {node for step, node in read.nodes.items() if isinstance(step, Layer) and step.changed})
    for step, node in read.nodes.items():
        if isinstance(step, Layer) and step.changed:
            _write_weights(module.get_submodule(step.name), step.weight, step.bias)
        elif isinstance(step, Rescale) and step.changed and not step.removed:
            _write_norm(module.get_submodule(step.name), step)
        if isinstance(step, Rescale) and step.removed:
            node.replace_all_uses_with(next(source for source in node.all_input_nodes if source.op != "get_attr"))
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return Folded(module, unfolded, outcome.records(), tuple(outcome.kept), _witnesses(read, outcome))


def _witnesses(read: Read, outcome: Outcome) -> tuple[tuple[str, str], ...]:
    """Return, for each fold, the node of the unfolded network and that of the folded one that answer alike after it."""
    witnesses = [absorbed.witness for absorbed in outcome.absorbed]
    return tuple((value.stands_for, read.nodes[value.producer].name) for value in witnesses if value.producer)


def _write_weights(module: nn.Module, weight: Array, bias: Array | None) -> None:
    module.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight)))
    if bias is not None:
        module.bias = nn.Parameter(torch.from_numpy(np.ascontiguousarray(bias)))


def _write_norm(norm: Any, step: Rescale) -> None:
    """Choose γ and β so that, with the statistics it has, the layer is the step's scale and shift."""
    mean, variance = (values.detach().numpy() for values in (norm.running_mean, norm.running_var))
    affine = step.affine.over(len(mean))
    _write_weights(norm, affine.scale * np.sqrt(variance + norm.eps), affine.shift + mean * affine.scale)


@dataclass(slots=True)
class _Gap:
    """The largest difference between two networks' answers and the largest magnitude of those wanted, over batches."""

    difference: float = 0.0
    magnitude: float = float(torch.finfo(torch.float64).tiny)

    def add(self, found: Tensor, wanted: Tensor) -> None:
        self.difference = _larger(self.difference, found.double() - wanted)
        self.magnitude = _larger(self.magnitude, wanted)

    @property
    def relative(self) -> float:
        return self.difference / self.magnitude


@torch.no_grad()
def verify(folded: Folded, images: Tensor) -> Folded:
    """Run both networks on real data and return the account with each fold's error.

    Both run in float64; the error of a fold is the largest difference over the largest magnitude, right after it.

    Shapes: images (N, channels, height, width), as the classifier takes them.
    Raises NotFoldable naming the layer when an error is more than rounding explains.
    """
    single, single_unfolded = (copy.deepcopy(one).float() for one in (folded.module, folded.unfolded))
    places = [(_Gap(), _Gap()) for _ in folded.witnesses]
    ends = _Gap(), _Gap(), _Gap()
    size = max(1, PIXELS_AT_ONCE // images[0, 0].numel())
    for part in (images[start : start + size] for start in range(0, len(images), size)):
        with_norm, without = (_answers(module, part.double()) for module in (folded.unfolded, folded.module))
        plain = _answers(single_unfolded, part.float())
        for (before, after), (error, rounding) in zip(folded.witnesses, places, strict=True):
            error.add(without[after], with_norm[before])
            rounding.add(plain[before], with_norm[before])
        for end, found in zip(ends, (without[ANSWER], single(part.float()), plain[ANSWER]), strict=True):
            end.add(found, with_norm[ANSWER])
    for (error, rounding), record in zip(places, folded.folds, strict=True):
        refuse_wrong(record.norm, error.relative, rounding.relative)
    records = (
        record.model_copy(update={"error": error.relative})
        for (error, _), record in zip(places, folded.folds, strict=True)
    )
    end_to_end = FoldError(float64=ends[0].relative, float32=ends[1].relative, float32_unfolded=ends[2].relative)
    return replace(folded, folds=tuple(records), end_to_end=end_to_end)


def _larger(least: float, values: Tensor) -> float:
    """Return the largest magnitude, `least` included; NaN where one is."""
    return float(torch.maximum(values.abs().max(), torch.tensor(least, dtype=values.dtype)))


def _answers(module: fx.GraphModule, images: Tensor) -> dict[str, Any]:
    """Run a network and return what each of its nodes answered, by name, and its answer as ANSWER."""
    interpreter = fx.Interpreter(module, garbage_collect_values=False)
    answer = interpreter.run(images)
    return {node.name: value for node, value in interpreter.env.items()} | {ANSWER: answer}


def _refuse_untrustworthy(name: str, norm: _BatchNorm) -> None:
    mend = None
    if norm.training:
        mend = "is in training mode, where an answer depends on the rest of its batch; call model.eval() first"
    elif norm.running_mean is None or norm.running_var is None:
        mend = "keeps no running statistics (track_running_stats=False); train it with track_running_stats=True"
    elif norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 0:
        mend = "was never updated (num_batches_tracked is 0); train it, or load a checkpoint that holds its buffers"
    elif bool((norm.running_mean == 0).all()) and bool((norm.running_var == 1).all()):
        mend = "still holds its initial statistics, mean 0 and variance 1; load a checkpoint that holds its buffers"
    if mend is not None:
        raise NotFoldable(f"BatchNorm {name} {mend}")
