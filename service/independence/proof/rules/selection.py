"""Operators that pick, join, pad or resample along named axes: harmless unless one is the batch axis."""

from dataclasses import dataclass

from service.independence.proof.call import Call, Table, axis_of, number
from service.independence.proof.extents import Dim, Extent, Times
from service.independence.proof.refusals import SYMBOLIC_BATCH, Mixed, Unproven
from service.independence.proof.values import Images, Slots, Value, as_fixed, known_shape

TO_THE_END = 2**31 - 1
"""Exporters write this, or more, for an end that is not there; no batch has so many rows."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One axis of a Slice."""

    axis: int
    start: Extent
    end: Extent
    step: Extent


def cuts_of(call: Call, rank: int) -> list[Cut]:
    """What a Slice does, axis by axis; attributes before opset 10, inputs since."""
    if call.opset < 10:
        starts, ends = list(call.attribute("starts", [])), list(call.attribute("ends", []))
        axes, steps = call.attribute("axes"), None
    else:
        starts, ends = call.extents(1), call.extents(2)
        axes, steps = call.numbers("axes", 3), call.extents(4) if call.get(4) is not None else None
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    rows = zip(axes, starts, ends, steps, strict=True)
    return [Cut(axis_of(axis, rank), start, end, step) for axis, start, end, step in rows]


def slice_(call: Call) -> Images:
    """Take a range of positions along some axes."""
    images = call.images()
    for cut in cuts_of(call, images.rank):
        if cut.axis == images.axis:
            _check_whole(images, cut)
        else:
            images = images.resized(cut.axis, _length(images.share[cut.axis], cut))
    return images


def _check_whole(images: Images, cut: Cut) -> None:
    to_the_end = isinstance(cut.end, int) and cut.end >= TO_THE_END
    to_the_end = to_the_end or (isinstance(cut.end, Times) and cut.end.factor >= images.rows)
    if cut.start != 0 or cut.step != 1 or not to_the_end:
        raise Mixed("picks or reorders images by their slot: it slices the batch axis", SYMBOLIC_BATCH)


def _length(dim: Dim, cut: Cut) -> Dim:
    start, end, step = number(cut.start), number(cut.end), number(cut.step)
    if dim is None or start is None or end is None or not step:
        return None
    return len(range(*slice(start, end, step).indices(dim)))


def gather(call: Call) -> Images:
    """Take slices of the first input at the positions in the second."""
    data, positions = call.operand(0), call.operand(1)
    if isinstance(data, Images) and isinstance(positions, Slots):
        return _by_slot(data, positions, call)
    if isinstance(data, Images):
        return _gather_from(data, positions, call)
    shape, indices = known_shape(as_fixed(data)), call.images(1)  # a table of embeddings
    axis = axis_of(call.attribute("axis", 0), len(shape))
    return indices.kept(axis + indices.axis, (*shape[:axis], *indices.share, *shape[axis + 1 :]))


def _gather_from(data: Images, positions: Value, call: Call) -> Images:
    shape = known_shape(as_fixed(positions))
    axis = axis_of(call.attribute("axis", 0), data.rank)
    if axis == data.axis:
        raise Mixed("picks images by their slot: it gathers along the batch axis")
    moved = data.axis + (len(shape) - 1 if data.axis > axis else 0)
    return data.kept(moved, (*data.share[:axis], *shape, *data.share[axis + 1 :]))


def _by_slot(data: Images, positions: Slots, call: Call) -> Images:
    """Gather each image's rows by address: slot · rows + offset, with offsets that stay within the image.

    torch.export writes as_strided so, on a tensor flattened to one axis.
    """
    within = positions.offsets.size and positions.offsets.min() >= 0 and positions.offsets.max() < data.rows
    own = data.outer == 1 and positions.stride == data.rows and within
    if axis_of(call.attribute("axis", 0), data.rank) != data.axis or not own:
        raise Mixed("picks elements of other images: it gathers at positions that leave an image's own")
    share = (*data.share[: data.axis], *positions.offsets.shape, *data.share[data.axis + 1 :])
    return Images(data.axis + positions.axis, share, outer=1)


def gather_nd(call: Call) -> Images:
    """Take blocks of the first input at the index tuples in the second, which cover its leading axes."""
    data, shape = call.images(), known_shape(as_fixed(call.operand(1)))
    shared, width = call.attribute("batch_dims", 0), shape[-1] if shape else None
    if width is None or shared:
        raise Unproven("gathers with batch_dims or with tuples of unknown length")
    if data.axis < width:
        raise Mixed("picks images by their slot: its index tuples cover the batch axis")
    return data.kept(data.axis - width + len(shape) - 1, (*shape[:-1], *data.share[width:]))


def concat(call: Call) -> Images:
    """Join along an axis."""
    parts = [value for value in call.inputs if value is not None]
    return join(parts, call.attribute("axis", 1))


def join(parts: list[Value], axis: int) -> Images:
    """Join tensors, all of which must carry images on the same axis, another one."""
    images = [part for part in parts if isinstance(part, Images)]
    first = images[0]
    axis = axis_of(axis, first.rank)
    if axis == first.axis:
        raise Mixed("joins tensors along the batch axis, so slots no longer belong to images")
    for part in parts:
        if not isinstance(part, Images):
            as_fixed(part)
            raise Mixed("joins images with a constant, whose extent along the batch axis is fixed", SYMBOLIC_BATCH)
        if (part.axis, part.rank, part.layout) != (first.axis, first.rank, first.layout):
            raise Mixed("joins tensors that carry the images on different axes")
    dims = [part.share[axis] for part in images]
    return first.resized(axis, None if None in dims else sum(dim or 0 for dim in dims))


def split(call: Call) -> tuple[Value, ...]:
    """Cut into pieces along an axis."""
    images = call.images()
    axis = axis_of(call.attribute("axis", 0), images.rank)
    if axis == images.axis:
        raise Mixed("splits the batch, so its pieces belong to slots")
    dims = piece_lengths(call, images.share[axis])
    return tuple(images.resized(axis, dim) for dim in dims)


def piece_lengths(call: Call, dim: Dim) -> list[Dim]:
    """The extents of a Split's pieces: given, or as equal as they can be with the last one smaller."""
    count = len(call.node.output)
    given = call.numbers("split", 1)
    if given is not None and len(given) == count:
        return list(given)
    if given is not None or dim is None:
        return [None] * count
    most = -(-dim // count)
    return [max(0, min(most, dim - index * most)) for index in range(count)]


def pad(call: Call) -> Images:
    """Pad some axes; an attribute before opset 11, an input since, on named axes since opset 18."""
    images = call.images()
    call.fixed(2)
    pads = list(call.attribute("pads")) if "pads" in call.attributes else call.extents(1)
    axes = call.numbers("axes", 3) or list(range(images.rank))
    for named, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        axis = axis_of(named, images.rank)
        if axis == images.axis and (before != 0 or after != 0):
            raise Mixed("pads the batch axis, so slots no longer belong to images")
        have, more, rest = images.share[axis], number(before), number(after)
        if axis != images.axis:
            images = images.resized(axis, None if None in (have, more, rest) else have + more + rest)  # type: ignore[operator]
    return images


def resize(call: Call) -> Images:
    """Resample; by `scales` or, since opset 11, by `sizes`. The batch axis must keep its extent."""
    images = call.images()
    mode = call.attribute("coordinate_transformation_mode", b"half_pixel")
    if mode == b"tf_crop_and_resize" or call.attribute("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise Unproven("crops while it resizes, or ties the axes' scales together")
    axes = [axis_of(axis, images.rank) for axis in call.numbers("axes", 99) or range(images.rank)]
    newer = call.opset >= 11 and call.operator == "Resize"
    if newer and call.get(3) is not None:
        return _resize_to(images, axes, call.extents(3))
    scales = as_fixed(call.operand(2 if newer else 1)).value if "scales" not in call.attributes else None
    found = call.attribute("scales") if scales is None else scales.tolist()
    if not found or len(found) != len(axes):
        raise Unproven("resizes by scales that are not constant")
    return _resize_by(images, axes, found)


def _resize_to(images: Images, axes: list[int], extents: list[Extent]) -> Images:
    for axis, extent in zip(axes, extents, strict=True):
        if axis != images.axis:
            images = images.resized(axis, number(extent))
        elif extent != Times(images.rows):
            raise Unproven("resizes the batch axis to a fixed extent", SYMBOLIC_BATCH)
    return images


def _resize_by(images: Images, axes: list[int], scales: list[float]) -> Images:
    for axis, scale in zip(axes, scales, strict=True):
        if axis == images.axis and scale != 1:
            raise Mixed("resamples the batch axis, which blends images")
        if axis != images.axis:
            images = images.resized(axis, _scaled(images.share[axis], scale))
    return images


def _scaled(dim: Dim, scale: float) -> Dim:
    exact = None if dim is None else dim * scale
    return (
        int(exact) if exact is not None and exact == int(exact) else None
    )  # else rounding decides, and kernels differ


RULES: Table = {
    ("", "Slice"): slice_,
    ("", "Gather"): gather,
    ("", "GatherND"): gather_nd,
    ("", "Concat"): concat,
    ("", "Split"): split,
    ("", "Pad"): pad,
    ("", "Resize"): resize,
    ("", "Upsample"): resize,
}
