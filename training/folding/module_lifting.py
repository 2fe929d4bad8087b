"""Makes modules of convolutions and linear layers that a traced network computes by function, weights in attributes."""

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

CONVOLVED = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
MODULES: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    functional.linear: (nn.Linear, CONVOLVED[:3]),
    torch.conv1d: (nn.Conv1d, CONVOLVED),
    torch.conv2d: (nn.Conv2d, CONVOLVED),
    torch.conv3d: (nn.Conv3d, CONVOLVED),
    torch.conv_transpose1d: (nn.ConvTranspose1d, TRANSPOSED),
    torch.conv_transpose2d: (nn.ConvTranspose2d, TRANSPOSED),
    torch.conv_transpose3d: (nn.ConvTranspose3d, TRANSPOSED),
}


def lift_layers(module: fx.GraphModule) -> None:
    """Replace every such call by a module that computes the same, in place; one whose weight is computed stays."""
    for node in list(module.graph.nodes):
        given = _numbers_of(node)
        if given is not None:
            owner, _, _ = given["weight"].target.rpartition(".")
            path = free_path(module, f"{owner}.{node.name}".lstrip("."))
            module.add_submodule(path, _layer(module, node, given))
            with module.graph.inserting_after(node):
                call = module.graph.call_module(path, (given["input"],))
            node.replace_all_uses_with(call)
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def free_path(module: nn.Module, wanted: str) -> str:
    """Return `wanted`, with a number where its owner has a submodule, a parameter or anything else of that name."""
    path, _, name = wanted.rpartition(".")
    owner = module.get_submodule(path)
    free, count = name, 1
    while hasattr(owner, free):
        count += 1
        free = f"{name}_{count}"
    return f"{path}.{free}".lstrip(".")


def attribute_at(module: Any, path: str) -> Any:
    """Return what a dotted path names."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _numbers_of(node: fx.Node) -> dict[str, Any] | None:
    """Return the arguments of a call by name where only its input is computed."""
    if node.op != "call_function" or node.target not in MODULES:
        return None
    given: dict[str, Any] = {**dict(zip(MODULES[node.target][1], node.args, strict=False)), **node.kwargs}
    bias = given.get("bias")
    stored = [given["weight"], *([] if bias is None else [bias])]
    are_stored = all(isinstance(one, fx.Node) and one.op == "get_attr" for one in stored)
    return given if are_stored and len(node.all_input_nodes) == 1 + len({*stored}) else None


def _layer(module: Any, node: fx.Node, given: dict[str, Any]) -> nn.Module:
    kind, names = MODULES[node.target]
    weight = attribute_at(module, given["weight"].target)
    bias = None if given.get("bias") is None else attribute_at(module, given["bias"].target)
    first, second, *kernel = weight.shape
    options = {name: given[name] for name in names[3:] if name in given}
    groups = options.get("groups", 1)
    inputs, outputs = (first, second * groups) if names is TRANSPOSED else (second * groups, first)
    built: Any = kind
    layer: nn.Module = built(inputs, outputs, *([kernel] if kernel else []), bias=bias is not None, **options)
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer.eval()
