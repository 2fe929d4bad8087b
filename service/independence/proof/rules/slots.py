"""Slot numbers, which exporters compute only to address an image's own elements (see `selection.gather`).

They stay followable under the arithmetic of addresses: times a number, plus constants, with axes moved.
Anything else that reads them would tell slots apart.
"""

from typing import Any

import numpy as np
from onnx import TensorProto

from service.independence.proof.call import Call, Table, axis_of
from service.independence.proof.refusals import Mixed
from service.independence.proof.rules.sizes import shape_of
from service.independence.proof.values import Slots, Value, as_fixed

COUNTS = "uses the number of an image's slot as a value"
Numbers = np.ndarray[Any, Any]


def _parts(call: Call) -> tuple[Slots, Numbers | Slots]:
    """The slot numbers and the other operand, either of which may come first."""
    first, second = call.operand(0), call.operand(1)
    slots, other = (first, second) if isinstance(first, Slots) else (second, first)
    if isinstance(other, Slots) and isinstance(slots, Slots):
        return slots, other
    value = as_fixed(other).value
    if not isinstance(slots, Slots) or value is None or value.dtype.kind not in "iu":
        raise Mixed(COUNTS)
    return slots, value


def _with_offsets(slots: Slots, stride: int, offsets: Numbers, end: int) -> Slots:
    """The same slots with other offsets, which must not differ along the batch axis."""
    if offsets.ndim < -end or offsets.shape[end] != 1:
        raise Mixed(COUNTS)
    return Slots(offsets.ndim + end, stride, offsets)


def add(call: Call) -> Slots:
    """Slot numbers plus a constant, or plus others on the same axis."""
    slots, other = _parts(call)
    end = slots.axis - slots.offsets.ndim
    if not isinstance(other, Slots):
        return _with_offsets(slots, slots.stride, slots.offsets + other, end)
    if other.axis - other.offsets.ndim != end:
        raise Mixed(COUNTS)
    return _with_offsets(slots, slots.stride + other.stride, slots.offsets + other.offsets, end)


def multiply(call: Call) -> Slots:
    """Slot numbers times one constant."""
    slots, other = _parts(call)
    if isinstance(other, Slots) or other.size != 1:
        raise Mixed(COUNTS)
    factor = int(other.item())
    return _with_offsets(slots, slots.stride * factor, slots.offsets * other, slots.axis - slots.offsets.ndim)


def unsqueeze(call: Call) -> Slots:
    """New axes of extent 1."""
    slots = _slots(call)
    axes = call.numbers("axes", 1) or []
    rank = slots.offsets.ndim + len(axes)
    new = {axis_of(axis, rank) for axis in axes}
    old = [axis for axis in range(rank) if axis not in new]
    return Slots(old[slots.axis], slots.stride, np.expand_dims(slots.offsets, tuple(new)))


def reshape(call: Call) -> Slots:
    """Reshape of a plain list of slots to one with more axes of extent 1, written [−1, 1, …]."""
    slots, wanted = _slots(call), call.extents(1)
    if slots.offsets.ndim != 1 or sorted(item for item in wanted if isinstance(item, int)) != [-1] + [1] * (
        len(wanted) - 1
    ):
        raise Mixed(COUNTS)
    return Slots(wanted.index(-1), slots.stride, slots.offsets.reshape([1] * len(wanted)))


def same(call: Call) -> Slots:
    """Identity, and Cast to a wide integer."""
    if call.operator == "Cast" and call.attribute("to") not in (TensorProto.INT64, TensorProto.INT32):
        raise Mixed(COUNTS)
    return _slots(call)


def _slots(call: Call) -> Slots:
    value: Value = call.operand(0)
    if not isinstance(value, Slots):
        raise Mixed(COUNTS)
    return value


RULES: Table = {("", name): same for name in ("Identity", "Cast")}
RULES |= {
    ("", "Add"): add,
    ("", "Mul"): multiply,
    ("", "Unsqueeze"): unsqueeze,
    ("", "Reshape"): reshape,
    ("", "Shape"): shape_of,
}
