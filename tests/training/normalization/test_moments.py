"""`training.normalization.moments`: merged over any parts they equal NumPy over the whole."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.normalization.moments import Moments


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    mean=st.floats(-1e4, 1e4),
    spread=st.floats(1e-2, 1e2),
    seed=st.integers(0, 2**31),
)
def test_merged_over_unequal_batches_they_are_those_of_all_values_together(sizes, mean, spread, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(mean, spread, (size, 3, 2, 2)) + rng.normal(0, spread, (1, 3, 1, 1)) for size in sizes]
    merged = Moments.of(torch.from_numpy(parts[0]))
    for part in parts[1:]:
        merged = merged.merged(Moments.of(torch.from_numpy(part)))
    whole = np.concatenate(parts).transpose(1, 0, 2, 3).reshape(3, -1)
    # a mean of at most 216 values of size |mean| + a few spreads; squares of values near the mean lose |mean|·2⁻⁵³ each
    scale = abs(mean) + 10 * spread
    np.testing.assert_allclose(merged.mean, whole.mean(1), rtol=0, atol=scale * 216 * 2**-53)
    tolerance = 216 * 2**-53 * (scale * 10 * spread + scale**2 * 216 * 2**-53)
    np.testing.assert_allclose(merged.variance, whole.var(1, ddof=1), rtol=1e-12, atol=10 * tolerance)


def test_a_large_offset_does_not_cancel_where_squares_would():
    offset = 1e6
    values = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    features = values.double() + offset
    halves = Moments.of(features[:10]).merged(Moments.of(features[10:]))
    wanted = features.numpy().var(ddof=1)
    assert abs(float(halves.variance) - wanted) < 1e-9 * wanted
    single = features.float()
    naive = float(single.square().mean() - single.mean().square())
    assert abs(naive - wanted) > wanted, "otherwise this test would show nothing"
