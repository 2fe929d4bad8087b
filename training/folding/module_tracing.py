"""Traces a PyTorch network into a graph of its layers, those of a person's own classes too."""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm

from training.errors import NotFoldable
from training.folding.module_effects import make_effects_plain
from training.folding.module_lifting import lift_layers
from training.folding.rounding import TOLERANCE

INSTEAD = "export it to ONNX with torch.onnx.export, and import that file"
CHECKED = 2  # images that the trace must answer as the network does
COMPUTING = frozenset({"forward", "__call__", "_conv_forward", "_check_input_dim"})  # what a layer's answer comes from


class LayerTracer(fx.Tracer):
    """Takes a class derived from one of torch's layers, with the same computation, for that layer."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Whether the module is one step, and not a network of its own; what its hooks do is steps of their own."""
        is_one = super().is_leaf_module(module, name) or _computes_as_torch_does(type(module))
        return is_one and not _has_hooks(module)


def trace(model: nn.Module, example: Tensor | None) -> fx.GraphModule:
    """Return a traced float64 copy in evaluation mode, with the shapes of every value where `example` is given.

    Raises NotFoldable where the network's own code does not run in float64 or cannot be traced, or the trace answers
    otherwise than the network.
    """
    network = copy.deepcopy(model).double().eval()
    few = None if example is None else example[:CHECKED].double()
    wanted = None if few is None else _wanted(network, few)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and (_has_hooks(module) or not _computes_as_torch_does(type(module))):
            checked: Any = module
            checked._check_input_dim = _check_nothing  # noqa: SLF001 - a question to a shape, which no trace can answer
    tracer = LayerTracer()
    try:
        graph = fx.GraphModule(network, tracer.trace(network))
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise NotFoldable(f"the network cannot be traced: {error}; {INSTEAD}") from error
    make_effects_plain(graph)
    lift_layers(graph)
    if few is not None:
        _refuse_other(_answer(graph, few), wanted)
    if example is not None:
        ShapeProp(graph).propagate(example.double())
    return graph


def _wanted(network: nn.Module, images: Tensor) -> Any:
    try:
        return _answer(network, images)
    except Exception as error:  # as where a tensor made in the model's own code is float32
        reason = str(error).partition("\n")[0]
        raise NotFoldable(f"the network cannot run in float64, in which it is folded: {reason}; {INSTEAD}") from error


@torch.no_grad()
def _answer(network: nn.Module, images: Tensor) -> Any:
    return network(images.clone())


def _refuse_other(found: Any, wanted: Any) -> None:
    """A trace is one path through a person's code: what the code decides, draws or keeps by itself is not in it."""
    if isinstance(wanted, tuple | list):
        for one, other in zip(found, wanted, strict=True):
            _refuse_other(one, other)
    elif isinstance(wanted, Tensor) and float((found - wanted).abs().max()) > TOLERANCE * float(wanted.abs().max()):
        raise NotFoldable(
            "the network, read as a graph, answers otherwise than the network itself: its code decides, draws or "
            "changes something that a graph of its layers does not hold; " + INSTEAD
        )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001 - nothing else tells


def _computes_as_torch_does(kind: type[nn.Module]) -> bool:
    """Whether no class between this one and torch's layer changes what the layer answers."""
    for one in kind.__mro__:
        if one.__module__.startswith("torch.nn"):
            return one is not nn.Module and not issubclass(one, nn.Sequential)
        if COMPUTING & vars(one).keys():
            return False
    return False


def _check_nothing(_: Tensor) -> None:
    pass
