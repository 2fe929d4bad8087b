"""The arithmetic of shapes: operators on small integer tensors that depend on the batch size at most.

Exporters spell "flatten but keep the batch" as Shape, Gather, Unsqueeze, Concat, Reshape and a dozen others.
Followed on extents instead of numbers, they come out as k·N where N stands, and stay harmless as long as they
only shape.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from onnx import TensorProto

from service.independence.proof import extents as ex
from service.independence.proof.call import Call, Table, number
from service.independence.proof.extents import Dim, Extent, Times, blur, from_dim, product, varies
from service.independence.proof.refusals import SYMBOLIC_BATCH, Mixed, Unproven
from service.independence.proof.rules.selection import cuts_of, piece_lengths
from service.independence.proof.values import (
    BATCH_SIZE_AS_VALUE,
    Fixed,
    Images,
    Sizes,
    Slots,
    Value,
    as_fixed,
    extents_of,
    known_shape,
    sizes,
)

Items = np.ndarray[Any, Any]


def shape_of(call: Call) -> Value:
    """Shape, whole or from `start` to `end` (opset 15)."""
    extents = _extents(call.operand(0))
    return sizes(extents[call.attribute("start", 0) : call.attribute("end", len(extents))])


def size_of(call: Call) -> Value:
    """Size: the number of elements."""
    start: Extent = 1
    return sizes(reduce(ex.multiply, _extents(call.operand(0)), start), ())


def _extents(value: Value) -> list[Extent]:
    if isinstance(value, Images):
        return value.shape()
    if isinstance(value, Slots):
        found: list[Extent] = list(value.offsets.shape)
        found[value.axis] = Times(1)
        return found
    if isinstance(value, Sizes):
        return list(value.items.shape)
    return [from_dim(dim) for dim in known_shape(value)]


def _items(call: Call, index: int) -> Items:
    value = call.operand(index)
    found = extents_of(value) if isinstance(value, Fixed | Sizes) else None
    if found is None:
        raise Mixed(BATCH_SIZE_AS_VALUE)  # arithmetic with fractions or images; shapes need neither
    return found


def folded(operation: Callable[[Extent, Extent], Extent]) -> Callable[[Call], Value]:
    """A rule that applies an operation element by element to all inputs, from left to right."""

    def rule(call: Call) -> Value:
        items = [_items(call, index) for index in range(len(call.inputs))]
        return sizes(reduce(np.frompyfunc(operation, 2, 1), items))

    return rule


def same(call: Call) -> Value:
    """An operator that leaves positive integers as they are."""
    return sizes(_items(call, 0))


def cast(call: Call) -> Value:
    """Cast; an extent survives only in the wide integer types."""
    items, kind = _items(call, 0), call.attribute("to")
    if kind in (TensorProto.INT64, TensorProto.INT32):
        return sizes(items)
    found = np.empty(items.shape, dtype=object)
    for place, item in np.ndenumerate(items):
        found[place] = blur(item)  # as a fraction it is good for nothing that shapes
    return Sizes(found)


def opposite(call: Call) -> Value:
    """Not."""
    return sizes(np.asarray(np.frompyfunc(ex.negate, 1, 1)(_items(call, 0)), dtype=object))


def where(call: Call) -> Value:
    """Where."""
    return sizes(np.frompyfunc(ex.choose, 3, 1)(*(_items(call, index) for index in range(3))))


def concat(call: Call) -> Value:
    """Concat."""
    parts = [_items(call, index) for index in range(len(call.inputs))]
    return sizes(np.concatenate(parts, axis=call.attribute("axis", 0)))


def gather(call: Call) -> Value:
    """Gather, at known positions."""
    positions = as_fixed(call.operand(1)).value
    if positions is None:
        raise Unproven("picks sizes at positions that are not constant")
    picked = np.take(_items(call, 0), positions.astype(np.int64), axis=call.attribute("axis", 0))
    return sizes(np.asarray(picked, dtype=object), positions.shape if not np.ndim(picked) else None)


def slice_(call: Call) -> Value:
    """Slice, between known positions."""
    items = _items(call, 0)
    index = [slice(None)] * items.ndim
    for cut in cuts_of(call, items.ndim):
        if not all(isinstance(edge, int) for edge in (cut.start, cut.end, cut.step)):
            raise Unproven("slices sizes at positions that are not constant")
        index[cut.axis] = slice(cut.start, cut.end, cut.step)
    return sizes(items[tuple(index)])


def split(call: Call) -> tuple[Value, ...]:
    """Split."""
    items, axis = _items(call, 0), call.attribute("axis", 0)
    lengths = [length or 0 for length in piece_lengths(call, items.shape[axis])]
    return tuple(sizes(part) for part in np.split(items, np.cumsum(lengths)[:-1], axis=axis))


def squeeze(call: Call) -> Value:
    """Squeeze."""
    axes = call.numbers("axes", 1)
    return sizes(np.squeeze(_items(call, 0), axis=None if axes is None else tuple(axes)))


def unsqueeze(call: Call) -> Value:
    """Unsqueeze."""
    return sizes(np.expand_dims(_items(call, 0), tuple(call.numbers("axes", 1) or ())))


def reshape(call: Call) -> Value:
    """Reshape."""
    return sizes(_items(call, 0).reshape(call.numbers("shape", 1) or ()))


def reduced(operation: Callable[[Extent, Extent], Extent], start: Extent | None) -> Callable[[Call], Value]:
    """A rule that combines all elements of a vector."""

    def rule(call: Call) -> Value:
        items = _items(call, 0)
        if items.ndim > 1 or (items.size == 0 and start is None):
            raise Unproven("reduces a matrix of sizes")
        total = reduce(operation, items.flat) if start is None else reduce(operation, items.flat, start)
        return sizes(total, (1,) if call.attribute("keepdims", 1) and items.ndim else ())

    return rule


def constant_of_shape(call: Call) -> Value:
    """ConstantOfShape: one value everywhere, so every image gets an equal block."""
    return uniform((1,) * len(call.extents(0)), call.extents(0))


def expand(call: Call) -> Value:
    """Expand of a constant, which must have extent 1 where N comes: every image gets an equal block."""
    shape, wanted = known_shape(as_fixed(call.operand(0))), call.extents(1)
    rank = max(len(shape), len(wanted))
    return uniform((*(1,) * (rank - len(shape)), *shape), [1] * (rank - len(wanted)) + wanted)


def uniform(shape: tuple[Dim, ...], wanted: list[Extent]) -> Value:
    """A constant of this shape, repeated along its axes of extent 1 to the extents wanted."""
    places = [axis for axis, extent in enumerate(wanted) if varies(extent)]
    if not places:
        return Fixed(tuple(_grown(dim, extent) for dim, extent in zip(shape, wanted, strict=True)))
    place = places[0]
    batch = wanted[place]
    if len(places) > 1 or not isinstance(batch, Times) or shape[place] != 1:
        raise Mixed(BATCH_SIZE_AS_VALUE, SYMBOLIC_BATCH)
    rest = [1 if axis == place else extent for axis, extent in enumerate(wanted)]
    share = [_grown(dim, extent) for dim, extent in zip(shape, rest, strict=True)]
    share[place] = batch.factor
    return Images(place, tuple(share), outer=1)


def _grown(dim: Dim, wanted: Extent) -> Dim:
    return number(wanted) if dim == 1 else dim


def tile(call: Call) -> Value:
    """Tile of a constant, N times along one axis: every image gets an equal block."""
    shape, repeats = known_shape(as_fixed(call.operand(0))), call.extents(1)
    places = [axis for axis, repeat in enumerate(repeats) if varies(repeat)]
    if len(places) != 1 or len(repeats) != len(shape):
        return Fixed(tuple(product((dim, number(again))) for dim, again in zip(shape, repeats, strict=True)))
    batch = repeats[places[0]]
    if not isinstance(batch, Times) or shape[places[0]] is None:
        raise Mixed(BATCH_SIZE_AS_VALUE, SYMBOLIC_BATCH)
    factors = [again.factor if isinstance(again, Times) else number(again) for again in repeats]
    return Images(places[0], tuple(product(pair) for pair in zip(shape, factors, strict=True)), outer=1)


def range_(call: Call) -> Value:
    """Range from 0 to N in steps of 1: the number of each slot. Any other that depends on N is refused."""
    start, limit, step = (_items(call, index).item() for index in range(3))
    if (start, limit, step) == (0, Times(1), 1):
        return Slots(0, 1, np.zeros(1, dtype=np.int64))
    if any(varies(item) for item in (start, limit, step)):
        raise Mixed("counts along the batch axis, so each slot gets its own value")
    return Fixed((None,))


OPERATIONS: dict[str, Callable[[Extent, Extent], Extent]] = {
    "Add": ex.add,
    "Sub": ex.subtract,
    "Mul": ex.multiply,
    "Div": ex.divide,
    "Mod": ex.remainder,
    "Max": ex.maximum,
    "Min": ex.minimum,
    "Equal": ex.equal,
    "Less": ex.less,
    "LessOrEqual": ex.at_most,
    "Greater": lambda a, b: ex.less(b, a),
    "GreaterOrEqual": lambda a, b: ex.at_most(b, a),
    "And": ex.both,
}
RULES: Table = {("", name): folded(operation) for name, operation in OPERATIONS.items()}
RULES |= {("", name): same for name in ("Identity", "Abs")}
RULES |= {
    ("", "Shape"): shape_of,
    ("", "Size"): size_of,
    ("", "Cast"): cast,
    ("", "Not"): opposite,
    ("", "Where"): where,
    ("", "Concat"): concat,
    ("", "Gather"): gather,
    ("", "Slice"): slice_,
    ("", "Split"): split,
    ("", "Squeeze"): squeeze,
    ("", "Unsqueeze"): unsqueeze,
    ("", "Reshape"): reshape,
    ("", "ReduceProd"): reduced(ex.multiply, 1),
    ("", "ReduceSum"): reduced(ex.add, 0),
    ("", "ReduceMax"): reduced(ex.maximum, None),
    ("", "ReduceMin"): reduced(ex.minimum, None),
    ("", "ConstantOfShape"): constant_of_shape,
    ("", "Expand"): expand,
    ("", "Tile"): tile,
    ("", "Range"): range_,
}
