"""Parts of one tensor that are said to share nothing never do; the usual pairs are said so."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.folding.module_parts import are_apart

bounds = st.none() | st.integers(-5, 5)
entries = st.integers(-3, 2) | st.builds(slice, bounds, bounds, st.sampled_from([None, 1, 2, 3]))
indices = entries | st.lists(entries, max_size=3).map(tuple)


@given(indices, indices, st.tuples(*[st.integers(3, 6)] * 3))
def test_what_is_said_to_share_nothing_shares_nothing(first, second, shape: tuple[int, int, int]):
    touched = [np.zeros(shape, int) for _ in range(2)]
    for one, index in zip(touched, (first, second), strict=True):
        one[index] = 1
    if are_apart(first, second):
        assert not (touched[0] & touched[1]).any()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (0, 1),
        (-1, -2),
        ((slice(None), slice(2)), (slice(None), slice(2, None))),
        ((slice(None), slice(2)), (slice(None), slice(3, 9))),
        ((slice(None), slice(None, -2)), (slice(None), slice(-2, None))),
        ((slice(None), slice(0, None, 2)), (slice(None), slice(1, None, 2))),
        ((slice(None), slice(None), slice(3)), (slice(None), slice(None), 3)),
    ],
)
def test_the_usual_pairs_are_known_to_share_nothing(first, second):
    assert are_apart(first, second)
    assert are_apart(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (slice(None), slice(None)),
        (0, -1),
        (slice(2), slice(-2, None)),
        (slice(0, None, 2), slice(1, None, 3)),
        ((..., slice(2)), (..., slice(2, None))),
        ((None, slice(2)), (slice(2, None),)),
        ([0], [1]),
        (True, slice(1, None)),
    ],
)
def test_what_a_shape_or_a_copy_decides_is_not(first, second):
    assert not are_apart(first, second)
