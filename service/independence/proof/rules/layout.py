"""Operators that move, merge, split or repeat axes and keep every element."""

from service.independence.proof.call import Call, Table, axis_of, number
from service.independence.proof.extents import FREE, TIED, Dim, Extent, Times, Unknown, from_dim, product
from service.independence.proof.refusals import SYMBOLIC_BATCH, Mixed, Unproven
from service.independence.proof.values import Images


def reshape(call: Call) -> Images:
    """Reshape, where 0 copies the extent of the input (unless `allowzero`) and −1 takes what is left."""
    images = call.images()
    wanted = call.extents(1)
    if not call.attribute("allowzero", 0):
        shape = images.shape()
        wanted = [shape[i] if extent == 0 and i < len(shape) else extent for i, extent in enumerate(wanted)]
    return view(images, wanted)


def flatten(call: Call) -> Images:
    """Flatten to a matrix, at `axis`."""
    images = call.images()
    axis = call.attribute("axis", 1)
    axis = images.rank if axis == images.rank else axis_of(axis, images.rank)
    shape = images.shape()
    return view(images, [_merged(shape[:axis]), _merged(shape[axis:])])


def _merged(extents: list[Extent]) -> Extent:
    dims = [extent.factor if isinstance(extent, Times) else number(extent) for extent in extents]
    total = product(dims)
    if any(isinstance(extent, Times) for extent in extents):
        return TIED if total is None else Times(total)
    return from_dim(total)


def view(images: Images, wanted: list[Extent]) -> Images:
    """Read the elements, in row-major order, under another shape.

    With `before` the product of all that stands before N, the memory is [before, N, rest] with images on the
    middle axis. The new shape keeps images apart exactly where as much stands before its N: on axes of its
    own, or as the outer part of the batch axis. Any other split sends elements of one image to another one's
    place.
    """
    wanted = _fill(images, wanted)
    if TIED in wanted or any(isinstance(extent, int) and extent < 0 for extent in wanted):
        raise Unproven("has a target shape that varies with the batch size in a way that could not be followed")
    places = [index for index, extent in enumerate(wanted) if isinstance(extent, Times)]
    if not places:
        reason = f"has the batch size fixed in its target shape {_written(wanted)}"
        raise Unproven(reason, SYMBOLIC_BATCH)
    if len(places) > 1:
        raise Mixed("has the batch size on two axes of its target shape")
    share = tuple(extent.factor if isinstance(extent, Times) else number(extent) for extent in wanted)
    _check_total(product(images.share), product(share))
    before = product((*images.share[: images.axis], images.outer))
    return Images(places[0], share, _outer(before, product(share[: places[0]]), share[places[0]]))


def _fill(images: Images, wanted: list[Extent]) -> list[Extent]:
    """Put in the extent that −1 stands for."""
    if wanted.count(-1) != 1:
        return wanted
    place = wanted.index(-1)
    others = wanted[:place] + wanted[place + 1 :]
    if place > 0 and wanted[0] == 1 and images.axis == 0 and not any(isinstance(other, Times) for other in others):
        raise Unproven(f"has the batch size fixed at 1 in its target shape {_written(wanted)}", SYMBOLIC_BATCH)
    return [*wanted[:place], _left_over(images, others), *wanted[place + 1 :]]


def _left_over(images: Images, others: list[Extent]) -> Extent:
    if TIED in others:
        return TIED
    takes_batch = not any(isinstance(other, Times) for other in others)
    rest = product(other.factor if isinstance(other, Times) else number(other) for other in others)
    total = product(images.share)
    if rest is None or total is None:
        return TIED if takes_batch else FREE
    if rest == 0 or total % rest:
        raise Mixed(f"cuts the {total} elements of an image into pieces of {rest}, which do not fit")
    return Times(total // rest) if takes_batch else total // rest


def _outer(before: Dim, after: Dim, rows: Dim) -> int:
    """What must be the outer part of the new batch axis, if its place and rows allow it."""
    if before is None or not after or not rows:
        raise Unproven("moves the batch axis past axes of unknown extent")
    if before % after or rows % (before // after):
        raise Mixed(f"moves elements across images: {before} rows stood before the batch, {after} stand there now")
    return before // after


def _check_total(before: Dim, after: Dim) -> None:
    if before is not None and after is not None and before != after:
        reason = f"gives an image {after} elements where it has {before}"
        raise Unproven(reason, SYMBOLIC_BATCH)


def _written(extents: list[Extent]) -> str:
    return "[" + ", ".join("?" if isinstance(item, Unknown | Times) else str(item) for item in extents) + "]"


def transpose(call: Call) -> Images:
    """Reorder the axes; the batch axis goes along."""
    images = call.images()
    order = list(call.attribute("perm", range(images.rank - 1, -1, -1)))
    if sorted(order) != list(range(images.rank)):
        raise Unproven(f"has an order of axes {order} that does not fit a tensor of rank {images.rank}")
    return images.kept(order.index(images.axis), tuple(images.share[axis] for axis in order))


def squeeze(call: Call) -> Images:
    """Drop axes of extent 1."""
    images = call.images()
    axes = call.numbers("axes", 1)
    if axes is None:
        raise Mixed("drops every axis of extent 1, the batch axis too when an image comes alone", "name its axes")
    gone = {axis_of(axis, images.rank) for axis in axes}
    if images.axis in gone:
        raise Unproven("drops the batch axis, as if the batch size were fixed at 1", SYMBOLIC_BATCH)
    share = tuple(dim for axis, dim in enumerate(images.share) if axis not in gone)
    return images.kept(images.axis - sum(axis < images.axis for axis in gone), share)


def unsqueeze(call: Call) -> Images:
    """Insert axes of extent 1, named by their place in the result."""
    images = call.images()
    axes = call.numbers("axes", 1) or []
    rank = images.rank + len(axes)
    new = {axis_of(axis, rank) for axis in axes}
    old = [axis for axis in range(rank) if axis not in new]
    if len(old) != images.rank:
        raise Unproven(f"inserts an axis twice: {axes}")
    dims = iter(images.share)
    return images.kept(old[images.axis], tuple(1 if axis in new else next(dims) for axis in range(rank)))


def expand(call: Call) -> Images:
    """Repeat along axes of extent 1 until the shape fits."""
    images = call.images()
    wanted = call.extents(1)
    rank = max(images.rank, len(wanted))
    shape: list[Extent] = [1] * (rank - images.rank) + images.shape()
    wanted = [1] * (rank - len(wanted)) + wanted
    axis = images.axis + rank - images.rank
    share: list[Dim] = [*(1 for _ in range(rank - images.rank)), *images.share]
    for place, (have, want) in enumerate(zip(shape, wanted, strict=True)):
        if place == axis:
            _check_kept(have, want)
        elif want != 1:
            share[place] = share[place] if share[place] not in (1, None) else number(want)
    return images.kept(axis, tuple(share))


def _check_kept(have: Extent, want: Extent) -> None:
    if want not in (1, have):
        reason = f"expands the batch axis to a fixed {want}" if isinstance(want, int) else "repeats the images"
        raise Unproven(reason, SYMBOLIC_BATCH)


def tile(call: Call) -> Images:
    """Repeat the tensor along its axes."""
    images = call.images()
    repeats = call.extents(1)
    if len(repeats) != images.rank:
        raise Unproven("has a number of repeats that does not fit its rank")
    if repeats[images.axis] != 1:
        raise Mixed("repeats the batch, so an image's copies stand among other images")
    dims = [product((dim, number(repeat))) for dim, repeat in zip(images.share, repeats, strict=True)]
    return images.kept(images.axis, tuple(dims))


RULES: Table = {
    ("", "Reshape"): reshape,
    ("", "Flatten"): flatten,
    ("", "Transpose"): transpose,
    ("", "Squeeze"): squeeze,
    ("", "Unsqueeze"): unsqueeze,
    ("", "Expand"): expand,
    ("", "Tile"): tile,
}
