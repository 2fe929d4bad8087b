"""Traces a PyTorch network into a graph of its layers, those of a person's own classes too."""

import copy
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm

from training.errors import NotFoldable
from training.folding.module_lifting import lift_layers

COMPUTING = frozenset({"forward", "__call__", "_conv_forward", "_check_input_dim"})  # what a layer's answer comes from


class LayerTracer(fx.Tracer):
    """Takes a class derived from one of torch's layers, with the same computation, for that layer."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Whether the module is one step, and not a network of its own."""
        return super().is_leaf_module(module, name) or _computes_as_torch_does(type(module))


def trace(model: nn.Module, example: Tensor | None) -> fx.GraphModule:
    """Return a traced float64 copy in evaluation mode, with the shapes of every value where `example` is given.

    Raises NotFoldable where the network's own code cannot be traced.
    """
    network = copy.deepcopy(model).double().eval()
    for module in network.modules():
        if isinstance(module, _BatchNorm) and not _computes_as_torch_does(type(module)):
            checked: Any = module
            checked._check_input_dim = _check_nothing  # noqa: SLF001 - a question to a shape, which no trace can answer
    tracer = LayerTracer()
    try:
        graph = fx.GraphModule(network, tracer.trace(network))
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise NotFoldable(f"the network cannot be traced: {error}") from error
    lift_layers(graph)
    if example is not None:
        ShapeProp(graph).propagate(example.double())
    return graph


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
