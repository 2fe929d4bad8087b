"""The checks on a checkpoint's network: what stands before each BatchNorm and should not."""

from collections import defaultdict
from collections.abc import Iterator

from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from service.wording import counted
from training.doctor.findings import Finding, finding
from training.errors import NotFoldable
from training.folding.module_passages import DROPOUTS
from training.folding.module_tracing import trace

LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
DROPS = (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)


def examine_network(network: nn.Module) -> Iterator[Finding]:
    """Yield what stands before each BatchNorm and should not; nothing for a network that cannot be traced."""
    try:
        graph = trace(network, None)
    except NotFoldable:
        return
    found = defaultdict(list)
    norms = [node for node in graph.graph.nodes if isinstance(_module(graph, node), _BatchNorm)]
    for node in norms:
        before = _before(graph, node)
        module = _module(graph, before)
        if isinstance(module, LINEAR) and module.bias is not None:
            found["bias-before"].append(str(node.target))
        if isinstance(module, DROPOUTS) or (before is not None and before.target in DROPS):
            found["dropout-before"].append(str(node.target))
    for check, names in found.items():
        yield finding(check, f"{len(names)} of {counted(len(norms), 'BatchNorm')}", names)


def _module(graph: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def _before(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return what feeds a node, past what changes nothing."""
    source = next(iter(node.all_input_nodes), None)
    while isinstance(_module(graph, source), nn.Identity):
        source = next(iter(source.all_input_nodes), None) if source is not None else None
    return source
