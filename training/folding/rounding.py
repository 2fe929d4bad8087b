"""How far a fold may be off in float64 before it is wrong, and not merely rounded in another order."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from training.errors import NotFoldable
from training.folding.graph_constants import FLOATS

TOLERANCE = 1e-10  # relative; float64 rounding of a sum of 10⁵ terms stays under it, a wrong fold does not
FINEST = 2.0**-53  # float64's unit roundoff; float32's is 2⁻²⁴, float16's 2⁻¹¹
FLOAT32: np.dtype[Any] = np.dtype(np.float32)
ROOM = 64  # the two precisions may add a sum in another order: √4096, for sums of 4096 products
SPENT = 0.1  # of the largest value: from here on, labels are decided by rounding


def coarsest(values: Iterable[NDArray[Any]]) -> np.dtype[Any]:
    """Return the float type with the largest unit roundoff among computed values, float32 where there is none."""
    found = {one.dtype for one in map(np.asarray, values) if helper.np_dtype_to_tensor_dtype(one.dtype) in FLOATS}
    return max(found, key=_roundoff, default=FLOAT32)


def refuse_wrong(name: str, error: float, own_error: float, own: np.dtype[Any] = FLOAT32) -> None:
    """Raise NotFoldable where float64 rounding does not explain a relative difference after the layer `name`.

    `own_error` is what the network's own type costs it unfolded at that place, relative. To first order rounding is
    the network's own condition times the unit roundoff (Higham 2002, Accuracy and Stability, section 1.6), so float64
    costs 2⁻²⁹ of what float32 does, 2⁻⁴² of what float16 does: a network that amplifies rounding layer by layer passes,
    a fold that is worse than its rounding does not. At most 1.2e-7 is let pass, for from an error of 1 on nothing can
    be told.
    """
    amplified = ROOM * FINEST / _roundoff(own) * min(own_error, 1.0) if own_error > 0 else 0.0  # a NaN explains nothing
    limit = max(TOLERANCE, amplified)
    if error <= limit:
        return
    reason = f"{name}: folded and unfolded differ by {error:.3g} relative, at most {limit:.2g} is rounding"
    if own_error > SPENT:
        reason += (
            f". Unfolded, too, {own.name} is {own_error:.0%} off float64 here: the network amplifies rounding until "
            "nothing of its answer is left; look at its BatchNorm statistics with `foldserve inspect --data`"
        )
    raise NotFoldable(reason)


def _roundoff(kind: np.dtype[Any]) -> float:
    return float(np.spacing(np.ones((), kind))) / 2
