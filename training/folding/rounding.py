"""How far a fold may be off in float64 before it is wrong, and not merely rounded in another order."""

from training.errors import NotFoldable

TOLERANCE = 1e-10  # relative; float64 rounding of a sum of 10⁵ terms stays under it, a wrong fold does not
FINER = 2.0**-29  # float64's unit roundoff over float32's: 2⁻⁵³ / 2⁻²⁴
ROOM = 64  # the two precisions may add a sum in another order: √4096, for sums of 4096 products
SPENT = 0.1  # of the largest value: from here on, labels are decided by rounding


def refuse_wrong(name: str, error: float, float32_error: float) -> None:
    """Raise NotFoldable where float64 rounding does not explain a relative difference after the layer `name`.

    `float32_error` is what float32 costs the unfolded network at that place, relative. To first order rounding is
    the network's own condition times the unit roundoff (Higham 2002, Accuracy and Stability, section 1.6), so float64
    costs 2⁻²⁹ of it: a network that amplifies rounding layer by layer passes, a fold that is worse than its rounding
    does not. At most 1.2e-7 is let pass, for from a float32 error of 1 on nothing can be told.
    """
    amplified = ROOM * FINER * min(float32_error, 1.0) if float32_error > 0 else 0.0  # a NaN explains nothing
    limit = max(TOLERANCE, amplified)
    if error <= limit:
        return
    reason = f"{name}: folded and unfolded differ by {error:.3g} relative, at most {limit:.2g} is rounding"
    if float32_error > SPENT:
        reason += (
            f". Unfolded, too, float32 is {float32_error:.0%} off float64 here: the network amplifies rounding until "
            "nothing of its answer is left; look at its BatchNorm statistics with `foldserve inspect --data`"
        )
    raise NotFoldable(reason)
