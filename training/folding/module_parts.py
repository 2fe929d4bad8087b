"""Which parts of one tensor share no element, by their indices alone, whatever its shape."""

from typing import Any

from torch import fx


def are_apart(first: Any, second: Any) -> bool:
    """Whether two indices of one value, of integers and slices, can never name the same element.

    A bound may be a number that the network computes, an fx.Node, which is known to equal itself alone.
    """
    first, second = (index if isinstance(index, tuple) else (index,) for index in (first, second))
    for one, other in zip(first, second, strict=False):  # axis by axis, from the first
        if not _is_plain(one) or not _is_plain(other):
            return False
        if _are_apart_on_axis(_as_slice(one), _as_slice(other)):
            return True
    return False


def _is_plain(entry: Any) -> bool:
    """An ellipsis, a new axis or a tensor would move the axes behind it."""
    return isinstance(entry, slice) or type(entry) is int


def _as_slice(entry: Any) -> slice:
    return (
        entry if isinstance(entry, slice) else slice(entry, entry + 1 or None)
    )  # −1 is the last: nothing is behind it


def _are_apart_on_axis(first: slice, second: slice) -> bool:
    """One ends before the other begins, or both step over what the other takes."""
    if _ends_before(first, second) or _ends_before(second, first):
        return True
    starts = [one.start or 0 for one in (first, second)]
    steps = {one.step or 1 for one in (first, second)}
    if any(type(number) is not int for number in (*starts, *steps)) or min(starts) < 0 or len(steps) > 1:
        return False
    return (starts[0] - starts[1]) % steps.pop() != 0


def _ends_before(one: slice, other: slice) -> bool:
    stop, start = one.stop, other.start
    if isinstance(stop, fx.Node):
        return stop is start
    return type(stop) is int and type(start) is int and (stop < 0) == (start < 0) and stop <= start
