"""Wherever the arithmetic with N claims to know a result, arithmetic on numbers agrees for every N."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.independence.proof import extents as ex
from service.independence.proof.extents import FREE, TIED, Extent, Times

SIZES = (1, 2, 3, 7, 64)
EXTENTS = st.one_of(st.integers(-6, 12), st.builds(Times, st.integers(1, 12)))
OPERATIONS: dict[str, tuple[Callable[[Extent, Extent], Extent], Callable[[int, int], int]]] = {
    "add": (ex.add, lambda a, b: a + b),
    "subtract": (ex.subtract, lambda a, b: a - b),
    "multiply": (ex.multiply, lambda a, b: a * b),
    "divide": (ex.divide, lambda a, b: int(a / b)),
    "remainder": (ex.remainder, lambda a, b: a % b),
    "less": (ex.less, lambda a, b: a < b),
    "at_most": (ex.at_most, lambda a, b: a <= b),
    "equal": (ex.equal, lambda a, b: a == b),
    "maximum": (ex.maximum, max),
    "minimum": (ex.minimum, min),
}


def at(extent: Extent, size: int) -> int:
    """The extent in a batch of this size."""
    assert isinstance(extent, int | Times)
    return extent.factor * size if isinstance(extent, Times) else extent


@pytest.mark.parametrize("name", OPERATIONS)
@given(a=EXTENTS, b=EXTENTS)
def test_what_is_known_holds_for_every_batch_size(name: str, a: Extent, b: Extent) -> None:
    symbolic, numeric = OPERATIONS[name]
    if name in ("divide", "remainder") and b == 0:
        return
    found = symbolic(a, b)
    if found is FREE:
        assert not ex.varies(a)
        assert not ex.varies(b)
    elif found is not TIED:
        assert [at(found, size) for size in SIZES] == [numeric(at(a, size), at(b, size)) for size in SIZES]


@pytest.mark.parametrize("name", OPERATIONS)
@given(a=EXTENTS, unknown=st.sampled_from([FREE, TIED]))
def test_nothing_that_varies_is_called_the_same_for_every_batch(name: str, a: Extent, unknown: Extent) -> None:
    symbolic, _ = OPERATIONS[name]
    for found in (symbolic(a, unknown), symbolic(unknown, a)):
        if ex.varies(a) or unknown is TIED:
            assert found is not FREE
            assert ex.varies(found) or found == 0  # nothing times nothing, or a remainder of it


@given(a=EXTENTS, b=EXTENTS)
def test_a_choice_that_varies_is_tied(a: Extent, b: Extent) -> None:
    assert ex.choose(TIED, a, b) is TIED
    assert ex.choose(True, a, b) == a
    assert ex.choose(False, a, b) == b
