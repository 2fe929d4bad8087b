"""Exact models: why their bits are the same wherever a kernel sums products, and the integers to hold kernels against.

`proof` checks the bounds from the file alone; `reference` computes the logits in float64, where every sum is exact.
"""

from service.independence.exactness.proof import THEOREM_VERSION, Exactness, LayerBound, prove_exact
from service.independence.exactness.reference import reference_logits

__all__ = ["THEOREM_VERSION", "Exactness", "LayerBound", "prove_exact", "reference_logits"]
