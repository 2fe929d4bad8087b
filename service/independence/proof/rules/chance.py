"""Operators that draw random numbers."""

from service.independence.proof.call import Call, Table
from service.independence.proof.extents import Extent
from service.independence.proof.refusals import EVAL_MODE, Mixed
from service.independence.proof.values import Fixed, Sizes, Value, extents_of


def random(call: Call) -> Value:
    """An operator whose result is drawn anew at every run."""
    raise Mixed("draws random numbers, so an image's answer changes from run to run", EVAL_MODE)


def dropout(call: Call) -> tuple[Value, ...]:
    """Dropout: the identity, unless it trains: an input since opset 12, is_test = 0 before opset 7."""
    training: Extent = call.attribute("is_test", int(call.opset >= 7)) == 0
    flag = call.get(2)
    if isinstance(flag, Fixed | Sizes):
        items = extents_of(flag)
        training = items.item() if items is not None and items.size == 1 else True
    elif flag is not None:
        training = True
    if training is not False and training != 0:
        raise Mixed("drops elements at random: it is, or may be, in training mode", EVAL_MODE)
    kept = call.operand(0)
    return kept, kept


RANDOM = (
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
)  # fmt: skip
RULES: Table = {("", name): random for name in RANDOM}
RULES |= {("", "Dropout"): dropout}
