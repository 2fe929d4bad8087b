"""What the proof knows of a tensor: the abstract values that travel along the graph's edges.

Fixed    the same for every batch: constants and what is computed from them alone
Sizes    small integer tensors that depend on the batch size at most: shapes and their arithmetic
Slots    integers that count images, stride · slot + offset: only good for addressing
Images   for each image a block of the tensor, a function of that image's pixels alone: the claim to be proved
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from service.independence.proof.extents import FREE, Dim, Extent, Times, from_dim, product, varies
from service.independence.proof.refusals import Mixed, Unproven

BATCH_SIZE_AS_VALUE = "uses the batch size as a value"


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """A tensor that depends on neither images nor batch size; `shape` and `value` are None where unknown."""

    shape: tuple[Dim, ...] | None
    value: np.ndarray[Any, Any] | None = None
    element_type: int = TensorProto.FLOAT


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """A tensor of extents, held as an object array; depends on the sizes of batch and images only."""

    items: np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Integers with extent N on `axis`; slot i holds `stride` · i + `offsets`, which have extent 1 there."""

    axis: int
    stride: int
    offsets: np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Images:
    """A tensor whose batch axis, read as [outer, N, group], holds at [:, i, :] a function of image i alone.

    `share` is the shape of what one image owns, so share[axis] is outer · group and the tensor has N times
    that there. It is also the shape of the tensor in a batch of one. Neither N nor i enter the function; all
    images have equal size. `outer` is 1 unless axes before the batch were merged into it, as attention over
    [length, N, heads] does.
    """

    axis: int
    share: tuple[Dim, ...]
    outer: int

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.share)

    @property
    def rows(self) -> int:
        """How many rows of the batch axis one image owns."""
        rows = self.share[self.axis]
        if not rows or rows % self.outer:
            raise Unproven("has a batch axis of a layout that could not be followed")
        return rows

    @property
    def layout(self) -> tuple[int, int]:
        """What two tensors must have in common for their batch axes to be aligned image by image."""
        return self.rows, self.outer

    def shape(self) -> list[Extent]:
        """The extents of the whole tensor, N included."""
        extents = [from_dim(dim) for dim in self.share]
        extents[self.axis] = Times(self.rows)
        return extents

    def kept(self, axis: int, share: tuple[Dim, ...]) -> "Images":
        """A tensor with the same batch axis, now at `axis`, among others."""
        if share[axis] != self.rows:
            raise Unproven("changes the number of rows an image has on the batch axis")
        return Images(axis, share, self.outer)

    def resized(self, axis: int, dim: Dim) -> "Images":
        """The same tensor with another per-image extent on one axis that is not the batch axis."""
        return self.kept(self.axis, (*self.share[:axis], dim, *self.share[axis + 1 :]))


Value = Fixed | Sizes | Slots | Images


def constant(value: Any) -> Fixed:
    """A known tensor."""
    array = np.asarray(value)
    return Fixed(array.shape, array, int(helper.np_dtype_to_tensor_dtype(array.dtype)))


def sizes(items: Any, shape: tuple[int, ...] | None = None) -> Fixed | Sizes:
    """Extents as a tensor: a constant where all are known numbers."""
    array = np.empty(len(items), dtype=object) if isinstance(items, list) else np.asarray(items, dtype=object)
    if isinstance(items, list):
        array[:] = items
    array = array if shape is None else array.reshape(shape)
    known = [item for item in array.flat if isinstance(item, int)]
    if len(known) < array.size:
        return Sizes(array)
    dtype = np.bool_ if known and all(isinstance(item, bool) for item in known) else np.int64
    return constant(array.astype(dtype))


def extents_of(value: Fixed | Sizes) -> np.ndarray[Any, Any] | None:
    """The tensor's elements as an object array of extents; None where they are no integers, or too many."""
    if isinstance(value, Sizes):
        return value.items
    if value.value is not None and value.value.dtype.kind in "biu":
        items = np.empty(value.value.shape, dtype=object)
        items[...] = value.value.tolist() if value.value.ndim else value.value.item()
        return items
    shape = value.shape
    if value.value is not None or shape is None or (count := product(shape)) is None or count > 64:
        return None
    return np.full(tuple(dim or 0 for dim in shape), FREE, dtype=object)


def as_fixed(value: Value) -> Fixed:
    """The value, which must not depend on images or on the batch size."""
    if isinstance(value, Fixed):
        return value
    if isinstance(value, Images):
        raise Mixed("computes one of its parameters from the images")
    if isinstance(value, Slots):
        raise Mixed("uses the number of an image's slot as a value")
    if any(varies(item) for item in value.items.flat):
        raise Mixed(BATCH_SIZE_AS_VALUE)
    return Fixed(value.items.shape, None, TensorProto.INT64)


def known_shape(value: Fixed) -> tuple[Dim, ...]:
    """The shape of a fixed tensor, whose rank must be known."""
    if value.shape is None:
        raise Unproven("has a constant operand of unknown rank")
    return value.shape
