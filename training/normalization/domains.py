"""One network for several domains: shared layers, and for each domain a BatchNorm of its own.

"Domain-specific batch normalization" (Chang et al. 2019, arXiv 1906.03950): statistics, γ and β belong to the domain,
everything else is learned from all. A network knows one active domain at a time, so a batch comes from one.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from training.normalization.layers import batch_norms, put_module


class DomainNorm(nn.Module):
    """A BatchNorm for each domain in the place of one; `active` says which normalises."""

    def __init__(self, norm: nn.Module, domains: Sequence[str]) -> None:
        super().__init__()
        self.domains = nn.ModuleDict({domain: copy.deepcopy(norm) for domain in domains})
        self.active = domains[0]

    def forward(self, features: Tensor) -> Tensor:
        """Return the features normalised by the active domain's BatchNorm."""
        normal: Tensor = self.domains[self.active](features)
        return normal


def separate(network: nn.Module, domains: Sequence[str]) -> nn.Module:
    """Put a DomainNorm in the place of every BatchNorm; each domain starts from what that one held."""
    for name, norm in list(batch_norms(network)):
        put_module(network, name, DomainNorm(norm, domains))
    return network


def activate(network: nn.Module, domain: str) -> None:
    """Let the following images be of `domain`; nothing happens where BatchNorm is shared."""
    for module in network.modules():
        if isinstance(module, DomainNorm):
            module.active = domain


@contextmanager
def active(network: nn.Module, domain: str) -> Iterator[None]:
    """`activate` for a while."""
    before = {module: module.active for module in network.modules() if isinstance(module, DomainNorm)}
    activate(network, domain)
    try:
        yield
    finally:
        for module, name in before.items():
            module.active = name


def of_domain(network: nn.Module, domain: str) -> nn.Module:
    """Return a copy with `domain`'s BatchNorm alone, an ordinary network that folds and exports."""
    plain = copy.deepcopy(network)
    for name, module in list(plain.named_modules()):
        if isinstance(module, DomainNorm):
            put_module(plain, name, module.domains[domain])
    return plain
