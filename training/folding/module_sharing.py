"""Layers that a traced network calls more than once: each call gets weights of its own, as long as folding lasts."""

import copy
from collections.abc import Collection, Mapping

from torch import fx, nn

from training.folding.module_lifting import free_path
from training.folding.module_reading import CONVOLUTIONS, TRANSPOSED

SHARED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


def untie(module: fx.GraphModule) -> dict[fx.Node, str]:
    """Give every call of a shared layer after its first a copy, in place; return what each such call named before.

    A layer has one identity under any number of names. Its copies have the same numbers, so the network computes the
    same.
    """
    seen: set[int] = set()
    named: dict[fx.Node, str] = {}
    for node in list(module.graph.nodes):
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, SHARED):
            continue
        if id(layer) in seen:
            named[node] = str(node.target)
            node.target = free_path(module, named[node])
            module.add_submodule(node.target, copy.deepcopy(layer))
        seen.add(id(layer))
    return named


def share_again(module: fx.GraphModule, named: Mapping[fx.Node, str], changed: Collection[fx.Node]) -> None:
    """Let the calls that folding left alone name the layer that they named before, or one copy where it changes."""
    taken = {id(module.get_submodule(str(node.target))) for node in changed}
    copies: dict[int, str] = {}
    for node, name in named.items():
        layer = id(module.get_submodule(name))
        if node not in changed:
            node.target = copies.setdefault(layer, str(node.target)) if layer in taken else name
