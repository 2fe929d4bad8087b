"""Makes plain what a traced network changes in place: whoever reads a tensor after the change reads the change itself.

A trace tells who reads whose answer. A call like `relu_(x)` whose answer nobody reads changes `x` all the same, and
would be dropped as dead code.
"""

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from training.errors import NotFoldable
from training.folding.module_parts import are_apart
from training.folding.module_passages import DROPOUTS

SPLITS = frozenset({"chunk", "split", "tensor_split", "unbind"})
DROPPED = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"})
# What may give the memory of its input another name, as a method, a function of torch or an operator.
VIEWS = frozenset({
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "transpose",
    "permute", "movedim", "swapaxes", "swapdims", "t", "expand", "expand_as", "broadcast_to", *SPLITS,
    "narrow", "select", "diagonal", "unfold", "getitem", "contiguous", "detach",
    "to", "type", "float", "double", *DROPPED,
})  # fmt: skip
SAME = (nn.Identity, nn.Flatten, nn.Unflatten, *DROPOUTS)
SEEN_AS = frozenset({"T", "mT", "H", "mH", "data"})  # attributes that are views
AUGMENTED: frozenset[Any] = frozenset({
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.imatmul, operator.iand, operator.ior, operator.ixor,
})  # fmt: skip


def make_effects_plain(module: fx.GraphModule) -> None:
    """Let everything that follows a change in place read its answer, in place itself.

    Raises NotFoldable where what is changed is read later under another name, as a view of it is.
    """
    for node in list(module.graph.nodes):
        changed = _changed_by(module, node)
        if changed is None:
            continue
        changed = _kept_from_caller(module, changed)
        order = {one: place for place, one in enumerate(module.graph.nodes)}
        for alias in _aliases(module, changed) - {changed, node}:
            later = (user for user in alias.users if order[user] > order[node] and user is not node)
            if not all(_is_apart(module, user, changed) for user in later):
                raise NotFoldable(
                    f"{node.name} changes in place what {alias.name} shows too, and that is read later; make a new "
                    "tensor instead, as `relu(x)` for `relu_(x)`, and join parts that changed with torch.cat"
                )
        changed.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])  # noqa: B023 - called now
        if any(_parts_around(module, changed)):
            with module.graph.inserting_before(node):  # for export, which would write the part back into the whole
                node.replace_input_with(changed, module.graph.call_function(torch.clone, (changed,)))


def _kept_from_caller(module: fx.GraphModule, changed: fx.Node) -> fx.Node:
    """Return what is changed, where it shows the images, which are the caller's, as a copy of them or a view of one."""
    given = next((alias for alias in _aliases(module, changed) if alias.op == "placeholder"), None)
    if given is None:
        return changed
    with module.graph.inserting_after(given):
        copy = module.graph.call_function(torch.clone, (given,))
    given.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
    return copy if changed is given else changed


def _changed_by(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return what a step changes in place in evaluation mode, where dropout changes nothing; None for nothing."""
    name = _name_of(node)
    changes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        changes = bool(getattr(layer, "inplace", False)) and not isinstance(layer, DROPOUTS)
    elif node.op == "call_function":
        of_torch = getattr(node.target, "__module__", "") != operator.and_.__module__  # and_, or_, not_ make new values
        changes = (changes and of_torch) or node.target in AUGMENTED or (name not in DROPPED and _asks_for_it(node))
        written = node.kwargs.get("out")
        if isinstance(written, fx.Node):
            return written
    return next(iter(node.all_input_nodes), None) if changes else None


def _asks_for_it(node: fx.Node) -> bool:
    function: Any = node.target
    try:
        return bool(inspect.signature(function).bind(*node.args, **node.kwargs).arguments.get("inplace", False))
    except (ValueError, TypeError):  # a function of C tells no signature, and takes no `inplace`
        return False


def _name_of(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _aliases(module: fx.GraphModule, node: fx.Node) -> set[fx.Node]:
    """Return all that may share the memory of a value, itself included."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in found and not _is_apart(module, one, node):
            found.add(one)
            waiting += _views_of(module, one)
            waiting += one.all_input_nodes[:1] if _is_view(module, one) else ()
    return found


def _is_apart(module: fx.GraphModule, one: fx.Node, changed: fx.Node) -> bool:
    """Whether a part is of the same value as what is changed, or lies in, and shares none of its elements."""
    if one.target is not operator.getitem:
        return False
    around = (part for part in _parts_around(module, changed) if part.args[0] is one.args[0])
    return any(are_apart(one.args[1], part.args[1]) for part in around)


def _parts_around(module: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """Yield the parts of values that a value is or lies in, from within."""
    while True:
        if node.target is operator.getitem:
            yield node
        if not _is_view(module, node):
            return
        node = node.all_input_nodes[0]


def _views_of(module: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if _is_view(module, user) and user.all_input_nodes[0] is node:
            yield user


def _is_view(module: fx.GraphModule, node: fx.Node) -> bool:
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), SAME)
    return node.args[1] in SEEN_AS if node.target is getattr else _name_of(node) in VIEWS
