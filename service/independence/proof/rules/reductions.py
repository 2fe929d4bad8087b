"""Operators that combine elements along named axes: reductions, softmax, sorting, sums that run, norms."""

from service.independence.proof.call import Call, Rule, Table, axis_of
from service.independence.proof.extents import Dim
from service.independence.proof.refusals import Mixed, Unproven
from service.independence.proof.rules.elementwise import check_flat
from service.independence.proof.values import Images, Value, as_fixed, known_shape

REDUCE = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]


def reduce(call: Call) -> Images:
    """Reduce over axes; an attribute at first, an input since opset 13 (Sum) or 18 (the others)."""
    images = call.images()
    axes = call.numbers("axes", 1)
    if not axes:
        if call.attribute("noop_with_empty_axes", 0):
            return images
        raise Mixed("reduces over all axes, and so over the batch")
    return _reduced(images, axes, call.attribute("keepdims", 1))


def argument(call: Call) -> Images:
    """ArgMax and ArgMin."""
    return _reduced(call.images(), [call.attribute("axis", 0)], call.attribute("keepdims", 1))


def _reduced(images: Images, axes: list[int], keep: int) -> Images:
    gone = {axis_of(axis, images.rank) for axis in axes}
    if images.axis in gone:
        raise Mixed(f"reduces over axis {images.axis}, the batch axis")
    if keep:
        return images.kept(images.axis, tuple(1 if axis in gone else dim for axis, dim in enumerate(images.share)))
    share = tuple(dim for axis, dim in enumerate(images.share) if axis not in gone)
    return images.kept(images.axis - sum(axis < images.axis for axis in gone), share)


def softmax(call: Call) -> Images:
    """Softmax over one axis; before opset 13 over `axis` and all that follow it, taken together."""
    images = call.images()
    if call.opset < 13:
        first = axis_of(call.attribute("axis", 1), images.rank)
        normalized = range(first, images.rank)
    else:
        normalized = range(one := axis_of(call.attribute("axis", -1), images.rank), one + 1)
    if images.axis in normalized:
        raise Mixed(f"normalizes over axis {images.axis}, the batch axis")
    return images


def along(default: int) -> Rule:
    """A rule for an operator that works along its attribute `axis` and keeps the shape."""

    def rule(call: Call) -> Images:
        images = call.images()
        if axis_of(call.attribute("axis", default), images.rank) == images.axis:
            raise Mixed(f"works along axis {images.axis}, the batch axis")
        return images

    return rule


def cumulative(call: Call) -> Images:
    """CumSum and CumProd, whose axis is an input."""
    images = call.images()
    axes = call.numbers("axis", 1)
    if not axes or axis_of(axes[0], images.rank) == images.axis:
        raise Mixed(f"accumulates along axis {images.axis}, the batch axis")
    return images


def top_k(call: Call) -> tuple[Value, ...]:
    """The largest or smallest along an axis, with their places on it; k is an attribute before opset 10."""
    images = call.images()
    axis = axis_of(call.attribute("axis", -1), images.rank)
    if axis == images.axis:
        raise Mixed(f"sorts along axis {images.axis}, the batch axis")
    count = call.numbers("k", 1)
    found = images.resized(axis, count[0] if count else None)
    return found, found


def layer_norm(call: Call) -> tuple[Value, ...]:
    """Normalization over `axis` and all that follow it, with fixed weights; also returns the statistics."""
    images = call.images()
    first = axis_of(call.attribute("axis", -1), images.rank)
    if images.axis >= first:
        raise Mixed(f"normalizes over axis {images.axis}, the batch axis")
    for index in (1, 2):
        if (weight := call.fixed(index)) is not None:
            check_flat(known_shape(weight), images.axis - images.rank)
    share: tuple[Dim, ...] = (*images.share[:first], *(1 for _ in images.share[first:]))
    statistics = images.kept(images.axis, share)
    return images, statistics, statistics


def mean_variance(call: Call) -> Images:
    """MeanVarianceNormalization, which by default normalizes over the batch too."""
    images = call.images()
    axes = call.attribute("axes", [0, 2, 3])
    if images.axis in {axis_of(axis, images.rank) for axis in axes}:
        raise Mixed(f"normalizes over axis {images.axis}, the batch axis")
    return images


def triangle(call: Call) -> Images:
    """Trilu: keeps a triangle of the matrices on the last two axes."""
    images = call.images()
    call.fixed(1)
    if images.axis >= images.rank - 2:
        raise Mixed("keeps or drops elements by their slot: the batch axis is one of its triangle's")
    return images


def compress(call: Call) -> Images:
    """Keep the positions along an axis where a fixed condition holds."""
    images = call.images()
    condition = as_fixed(call.operand(1))
    axis = call.attribute("axis")
    if axis is None or axis_of(axis, images.rank) == images.axis:
        raise Mixed("picks images by their slot")
    kept = None if condition.value is None else int(condition.value.sum())
    return images.resized(axis_of(axis, images.rank), kept)


def across_batch(call: Call) -> Images:
    """Operators that list what they find in the whole tensor, in an order that belongs to no image."""
    if any(isinstance(value, Images) for value in call.inputs):
        raise Mixed("lists what it finds in the whole batch, so the images around decide where an answer stands")
    raise Unproven("has a result whose shape could not be followed")


RULES: Table = {("", f"Reduce{name}"): reduce for name in REDUCE}
RULES |= {("", name): argument for name in ("ArgMax", "ArgMin")}
RULES |= {("", name): softmax for name in ("Softmax", "LogSoftmax", "Hardmax")}
RULES |= {("", name): cumulative for name in ("CumSum", "CumProd")}
RULES |= {("", name): layer_norm for name in ("LayerNormalization", "RMSNormalization")}
RULES |= {("", name): across_batch for name in ("NonZero", "Unique", "NonMaxSuppression")}
RULES |= {
    ("", "LpNormalization"): along(-1),
    ("", "MeanVarianceNormalization"): mean_variance,
    ("", "TopK"): top_k,
    ("", "Trilu"): triangle,
    ("", "Compress"): compress,
}
