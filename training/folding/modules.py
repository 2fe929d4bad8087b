"""Folding for PyTorch modules, by traced graph: who feeds whom is read from the graph, never guessed from sizes.

A BatchNorm is folded into the convolution or linear layer that feeds it when nothing else sees that layer's output
or uses that layer. Every other BatchNorm stays, and the result says why.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm

from service.artifact import FoldRecord, KeptRecord
from training.errors import NotFoldable
from training.folding.algebra import Norm, fold_into_conv, fold_into_linear
from training.normalization import batch_norms

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TOLERANCE = 1e-10  # relative; float64 rounding of a sum of 10⁵ terms stays under it, a wrong fold does not


@dataclass(frozen=True, slots=True)
class Folded:
    """A classifier in float64 without the BatchNorm that could go, the same one with it, and the account of it."""

    module: fx.GraphModule
    unfolded: fx.GraphModule
    folds: tuple[FoldRecord, ...]
    kept: tuple[KeptRecord, ...]
    nodes: tuple[str, ...]  # for each of `folds`, the BatchNorm's node in the unfolded graph; a layer may have several


def fold(model: nn.Module, example: Tensor | None = None) -> Folded:
    """Fold the BatchNorm of a classifier in evaluation mode; the model itself is left alone.

    `example`, images (N, channels, height, width), tells the ranks inside the network: a linear layer's BatchNorm1d is
    folded only where its input is seen to have rank 2, for on rank 3 it normalizes another axis.

    Raises NotFoldable, with the layer's name and the mend, where a BatchNorm is in training mode, keeps no running
    statistics, was never updated, or holds numbers that cannot be: those models answer wrongly, folded or not.
    """
    for name, norm in batch_norms(model):
        _refuse_untrustworthy(name, norm)
    unfolded = _trace(model, example)
    module = copy.deepcopy(unfolded)
    folds, kept, nodes = [], [], []
    for node in list(module.graph.nodes):
        if not isinstance(_module_of(module, node), _BatchNorm):
            continue
        layer_node, reason = _foldable(module, node)
        if layer_node is None:
            kept.append(KeptRecord(norm=str(node.target), reason=reason))
        else:
            nodes.append(node.name)
            folds.append(_fold_into(module, node, layer_node))
    module.delete_all_unused_submodules()
    module.recompile()
    return Folded(module, unfolded, tuple(folds), tuple(kept), tuple(nodes))


@torch.no_grad()
def verify(folded: Folded, images: Tensor) -> Folded:
    """Run every fold on real data and return the account with each one's error.

    For each fold, the unfolded network's own input of the layer goes through layer and BatchNorm, and through the
    folded layer, both in float64; the error is the largest difference over the largest magnitude.

    Shapes: images (N, channels, height, width), as the classifier takes them.
    Raises NotFoldable naming the layer when an error exceeds TOLERANCE.
    """
    observer = _Observer(folded)
    observer.run(images.double())
    records = []
    for node, record in zip(folded.nodes, folded.folds, strict=True):
        error = observer.errors[node]
        if not error <= TOLERANCE:
            raise NotFoldable(
                f"{record.norm}: folded and unfolded differ by {error:.3g} relative, at most {TOLERANCE} is rounding"
            )
        records.append(record.model_copy(update={"error": error}))
    return replace(folded, folds=tuple(records))


class _Observer(fx.Interpreter):
    """Runs the unfolded network and, wherever a folded BatchNorm answers, the folded layer beside it."""

    def __init__(self, folded: Folded) -> None:
        super().__init__(folded.unfolded, garbage_collect_values=False)  # a layer's input is read after its use
        self.errors: dict[str, float] = {}
        self._folded = folded.module
        self._into = dict(zip(folded.nodes, (record.into for record in folded.folds), strict=True))

    def run_node(self, n: fx.Node) -> Any:
        answer = super().run_node(n)
        if n.name in self._into:
            layer_node = _input_of(n)
            assert isinstance(layer_node, fx.Node)
            features = self.map_nodes_to_values(_input_of(layer_node), n)
            beside = self._folded.get_submodule(self._into[n.name])(features)
            scale = answer.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
            self.errors[n.name] = float((beside - answer).abs().max() / scale)
        return answer


def _trace(model: nn.Module, example: Tensor | None) -> fx.GraphModule:
    try:
        graph = fx.symbolic_trace(copy.deepcopy(model).double().eval())
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise NotFoldable(f"the network cannot be traced: {error}") from error
    if example is not None:
        ShapeProp(graph).propagate(example.double())
    return graph


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


def _foldable(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node | None, str]:
    """Return the layer to fold into, or None and the reason why this BatchNorm stays."""
    producer = _input_of(node)
    layer = _module_of(module, producer)
    if not isinstance(producer, fx.Node) or not isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
        return None, "what feeds it is neither a convolution nor a linear layer"
    name = str(producer.target)
    reasons = {
        f"the output of {name} is used elsewhere too": len(producer.users) > 1,
        f"{name} is used more than once": sum(other.target == name for other in _module_calls(module)) > 1,
        f"the parameters of {name} are read elsewhere too": _reads_parameters(module, name),
        f"{name} is called with more than its input": len(producer.args) + len(producer.kwargs) > 1,
        f"{name} is parametrized; remove the parametrization first": nn.utils.parametrize.is_parametrized(layer),
        f"{name} is linear, and its input is not known to have rank 2": isinstance(layer, nn.Linear)
        and _rank(producer) != 2,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), "")
    return (None if reason else producer), reason


def _fold_into(module: fx.GraphModule, norm_node: fx.Node, layer_node: fx.Node) -> FoldRecord:
    norm_name, layer_name = str(norm_node.target), str(layer_node.target)
    layer: Any = module.get_submodule(layer_name)
    norm = _read_norm(module.get_submodule(norm_name))
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    weight = layer.weight.detach().numpy()
    try:
        if isinstance(layer, nn.Linear):
            new_weight, new_bias = fold_into_linear(weight, bias, norm)
        else:
            transposed = isinstance(layer, TRANSPOSED)
            new_weight, new_bias = fold_into_conv(weight, bias, norm, transposed=transposed, groups=layer.groups)
    except NotFoldable as error:
        raise NotFoldable(f"BatchNorm {norm_name}: {error}") from None
    layer.weight = nn.Parameter(torch.from_numpy(new_weight))
    layer.bias = nn.Parameter(torch.from_numpy(new_bias))
    norm_node.replace_all_uses_with(layer_node)
    module.graph.erase_node(norm_node)
    scale = np.abs(norm.scale_and_shift()[0])
    return FoldRecord(
        norm=norm_name,
        into=layer_name,
        kind=type(layer).__name__,
        scale_min=float(scale.min()),
        scale_max=float(scale.max()),
        weight_max=float(np.abs(new_weight).max()),
        bias_max=float(np.abs(new_bias).max()),
    )


def _input_of(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _rank(node: fx.Node) -> int | None:
    metadata = node.meta.get("tensor_meta")  # what ShapeProp leaves
    return None if metadata is None else len(metadata.shape)


def _reads_parameters(module: fx.GraphModule, layer_name: str) -> bool:
    return any(node.op == "get_attr" and str(node.target).startswith(f"{layer_name}.") for node in module.graph.nodes)


def _read_norm(norm: Any) -> Norm:
    def array(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().numpy().astype(np.float64)

    return Norm(array(norm.running_mean), array(norm.running_var), norm.eps, array(norm.weight), array(norm.bias))


def _module_of(module: fx.GraphModule, node: Any) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _module_calls(module: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in module.graph.nodes if node.op == "call_module")
