"""Reads a traced PyTorch network into a `network`: its steps in order, and which node each stands for."""

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from training.errors import NotFoldable
from training.folding.algebra import Affine, Array, Norm
from training.folding.arithmetic import affine_of, per_channel
from training.folding.module_lifting import attribute_at
from training.folding.module_passages import rule_of_call, rule_of_module
from training.folding.network import Account, Join, Layer, Other, Passage, Rescale, Step, Value
from training.folding.passages import Shape, Stays

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
ADDITIONS = (operator.add, operator.iadd, torch.add, "add")
SUBTRACTIONS = (operator.sub, operator.isub, torch.sub, "sub")
ARITHMETIC = {
    **dict.fromkeys(ADDITIONS, "Add"),
    **dict.fromkeys(SUBTRACTIONS, "Sub"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul"), "Mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div"), "Div"),
}


@dataclass(slots=True)
class Read:
    """A traced network and its steps; `nodes` has the node of each."""

    module: fx.GraphModule
    steps: list[Step] = field(default_factory=list)
    nodes: dict[Step, fx.Node] = field(default_factory=dict)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    calls: Counter[int] = field(default_factory=Counter)  # of each module, by identity: one module may have two names
    read: set[str] = field(default_factory=set)  # parameters that the graph reads without their module


def read_module(module: fx.GraphModule) -> Read:
    """Read a traced network whose numbers are float64; shapes are those that ShapeProp left.

    Raises NotFoldable naming the BatchNorm whose numbers cannot be.
    """
    read = Read(module)
    for node in module.graph.nodes:
        read.values[node] = Value(node.name, _shape(node))
        if node.op == "call_module":
            read.calls[id(module.get_submodule(str(node.target)))] += 1
        elif node.op == "get_attr":
            read.read.add(str(node.target))
    for node in module.graph.nodes:
        if node.op == "output":
            for source in node.all_input_nodes:
                read.values[source].escapes = True
        elif node.op not in {"placeholder", "get_attr"}:
            _add(read, node)
    return read


def input_of(node: fx.Node) -> Any:
    """Return what flows in first, given by position or by keyword."""
    return node.args[0] if node.args else node.kwargs.get("input")


def _add(read: Read, node: fx.Node) -> None:
    step = _read_call(read, node) if node.op == "call_module" else _read_function(read, node)
    if step is None:
        flowing = [read.values[source] for source in node.all_input_nodes if source.op != "get_attr"]
        step = Other(name=_name(node), kind=_kind(read, node), inputs=flowing, output=read.values[node])
    read.steps.append(step)
    read.nodes[step] = node
    step.output.producer = step
    for value in step.inputs:
        value.users.append(step)


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _kind(read: Read, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(read.module.get_submodule(str(node.target))).__name__
    return str(getattr(node.target, "__name__", node.target))


def _shape(node: fx.Node) -> Shape | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def _step(read: Read, node: fx.Node, kind: Callable[..., Step], *sources: fx.Node, **fields: Any) -> Step:
    flowing = [read.values[source] for source in sources]
    return kind(name=_name(node), kind=_kind(read, node), inputs=flowing, output=read.values[node], **fields)


def _read_call(read: Read, node: fx.Node) -> Step | None:
    module: Any = read.module.get_submodule(str(node.target))
    source = input_of(node)
    if not isinstance(source, fx.Node) or len(node.all_input_nodes) > 1:
        return None
    if isinstance(module, _BatchNorm):
        return _batch_norm(read, node, source, module)
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
        return _layer(read, node, source, module)
    rule = rule_of_module(module, read.values[source].shape, read.values[node].shape)
    return None if rule is None else _step(read, node, Passage, source, rule=rule)


def _batch_norm(read: Read, node: fx.Node, source: fx.Node, module: Any) -> Step:
    affine = _affine(str(node.target), _read_norm(module))
    account = Account.of(_name(node), "BatchNorm", affine)
    locked = f"{_name(node)} is used more than once" if read.calls[id(module)] > 1 else ""
    return _step(read, node, Rescale, source, affine=affine, axis=1, accounts=[account], frozen=locked)


def _affine(name: str, norm: Norm) -> Affine:
    try:
        return Affine(*norm.scale_and_shift())
    except NotFoldable as error:
        raise NotFoldable(f"BatchNorm {name}: {error}") from None


def _layer(read: Read, node: fx.Node, source: fx.Node, module: Any) -> Step:
    linear = isinstance(module, nn.Linear)
    return _step(
        read,
        node,
        Layer,
        source,
        weight=_array(module.weight),
        bias=_array(module.bias),
        groups=1 if linear else module.groups,
        transposed=isinstance(module, TRANSPOSED),
        pads_zeros=not linear and module.padding_mode == "zeros" and _pads(module),
        locked=_why_locked(read, node, module),
    )


def _pads(module: Any) -> bool:
    """Whether a convolution pads: `padding` is a number for each axis, or "same" or "valid"."""
    if isinstance(module.padding, str):
        return module.padding == "same" and any(size > 1 for size in module.kernel_size)
    return any(module.padding)


def _why_locked(read: Read, node: fx.Node, module: Any) -> str:
    name = str(node.target)
    reasons = {
        f"{name} is used more than once": read.calls[id(module)] > 1,
        f"the parameters of {name} are read elsewhere too": any(one.startswith(f"{name}.") for one in read.read),
        f"{name} is called with more than its input": len(node.args) + len(node.kwargs) > 1,
        f"{name} is parametrized; remove the parametrization first": parametrize.is_parametrized(module),
        f"{name} computes its weight by hooks; remove them first": bool(module._forward_pre_hooks),  # noqa: SLF001
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _read_function(read: Read, node: fx.Node) -> Step | None:
    target: Any = node.target
    source = input_of(node)
    if target in ARITHMETIC:
        return _arithmetic(read, node, ARITHMETIC[target])
    if target in {torch.cat, torch.concat}:
        return _concat(read, node)
    if target is functional.batch_norm:
        return _functional_norm(read, node)
    if not isinstance(source, fx.Node) or node.all_input_nodes != [source]:
        return None
    rule = rule_of_call(node, read.values[source].shape, read.values[node].shape)
    return None if rule is None else _step(read, node, Passage, source, rule=rule)


def _functional_norm(read: Read, node: fx.Node) -> Step | None:
    """Read a BatchNorm that a class of its own computes: its numbers are attributes, and it is not in training."""
    given: dict[str, Any] = {**dict(zip(NORM_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    source, numbers = given["input"], [given.get(name) for name in NORM_ARGUMENTS[1:5]]
    if given.get("training", False) is not False or not isinstance(source, fx.Node):
        return None
    are_stored = all(one is None or (isinstance(one, fx.Node) and one.op == "get_attr") for one in numbers)
    if None in numbers[:2] or not are_stored:
        return None
    arrays: list[Any] = [None if one is None else _array(attribute_at(read.module, one.target)) for one in numbers]
    mean, variance, weight, bias = arrays
    name = str(given["running_mean"].target).rpartition(".")[0] or node.name
    affine = _affine(name, Norm(mean, variance, given.get("eps", 1e-5), weight, bias))
    account = Account.of(name, "BatchNorm", affine)
    fields: dict[str, Any] = {"affine": affine, "axis": 1, "accounts": [account]}
    return _step(read, node, Rescale, source, **fields, frozen=f"{name} is computed in code")


def _concat(read: Read, node: fx.Node) -> Step | None:
    branches, axis = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    rank = read.values[node].rank
    if not isinstance(branches, tuple | list) or not isinstance(axis, int) or (axis < 0 and rank is None):
        return None
    sources = [one for one in branches if isinstance(one, fx.Node) and one.op != "get_attr"]
    if len(sources) < len(branches):
        return None
    return _step(read, node, Join, *sources, axis=axis if axis >= 0 else axis + (rank or 0))


def _arithmetic(read: Read, node: fx.Node, kind: str) -> Step | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    flowing = [one for one in node.args if isinstance(one, fx.Node) and one.op != "get_attr"]
    if len(flowing) == 2:
        return _step(read, node, Join, *flowing) if kind in {"Add", "Sub"} else None
    if len(flowing) != 1:
        return None
    first = node.args[0] is flowing[0]
    constant = _constant(read, node.args[1 if first else 0])
    if constant is None:
        return None
    try:
        values, axis = per_channel(constant, read.values[flowing[0]].shape)
        affine = affine_of(kind, values, swapped=not first)
    except Stays:
        return None
    account = Account.of(_name(node), kind, affine)
    notable = axis is not None and kind in {"Mul", "Div"}
    fields = {"affine": affine, "axis": axis, "accounts": [account], "notable": notable}
    return _step(read, node, Rescale, *flowing, **fields, frozen=f"{_name(node)} is arithmetic in code")


def _constant(read: Read, given: Any) -> Array | None:
    if isinstance(given, int | float):
        return np.asarray(given, np.float64)
    tensor = attribute_at(read.module, str(given.target)) if isinstance(given, fx.Node) else None
    return _array(tensor) if isinstance(tensor, Tensor) and tensor.is_floating_point() else None


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy().astype(np.float64)


def _read_norm(norm: Any) -> Norm:
    arrays = (_array(tensor) for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    mean, variance, weight, bias = arrays
    return Norm(mean, variance, norm.eps, weight, bias)
