"""Operators with nested graphs: If and Loop. What decides the way must be the same for every batch."""

import numpy as np

from service.independence.proof.call import Call, Table
from service.independence.proof.extents import Extent, Unknown, varies
from service.independence.proof.refusals import Mixed, Unproven
from service.independence.proof.values import Fixed, Images, Sizes, Slots, Value, constant, extents_of

MOST_TURNS = 64
"""A loop is unrolled; more turns than this are left unproven."""


def condition_of(value: Value | None, what: str) -> Extent:
    """What decides the way: a number, or FREE where it is fixed but not known."""
    if isinstance(value, Images):
        raise Mixed(f"takes {what} from the images, so one image decides for all")
    if isinstance(value, Slots):
        raise Mixed(f"takes {what} from slot numbers")
    items = extents_of(value) if isinstance(value, Fixed | Sizes) else None
    found: Extent = Unknown.FREE if items is None or items.size != 1 else items.item()
    if varies(found):
        raise Mixed(f"takes {what} from the batch size")
    return found


def if_(call: Call) -> tuple[Value, ...]:
    """If: the branch taken where the condition is known, else both, which must agree."""
    taken = condition_of(call.get(0), "its condition")
    branches = [call.attribute("then_branch"), call.attribute("else_branch")]
    if isinstance(taken, int):
        return call.enter(branches[0 if taken else 1], [])
    results = [call.enter(branch, []) for branch in branches]
    return tuple(_agreed(a, b) for a, b in zip(*results, strict=True))


def _agreed(a: Value, b: Value) -> Value:
    if isinstance(a, Images) and a == b:
        return a
    if isinstance(a, Fixed) and isinstance(b, Fixed):
        return Fixed(a.shape if a.shape == b.shape else None)
    raise Unproven("has branches that treat the batch axis differently")


def loop(call: Call) -> tuple[Value, ...]:
    """Loop: unrolled, where the number of turns is known and small and nothing in the body ends it early."""
    turns = condition_of(call.get(0), "its number of turns") if call.get(0) is not None else Unknown.FREE
    goes = condition_of(call.get(1), "its condition") if call.get(1) is not None else True
    body = call.attribute("body")
    carried = [call.operand(index) for index in range(2, len(call.inputs))]
    if not isinstance(turns, int) or turns > MOST_TURNS or not isinstance(goes, int):
        _refuse_blind(call, body, carried)
        raise Unproven("has a number of turns that is not a small constant: no rule for such a Loop")
    for turn in range(turns if goes else 0):
        given = [constant(np.int64(turn)), constant(np.bool_(True)), *carried]
        found = call.enter(body, given)
        if condition_of(found[0], "the condition to go on") is not True:
            raise Unproven("may end before its number of turns: no rule for such a Loop")
        carried = list(found[1 : len(carried) + 1])
    if len(call.node.output) > len(carried):
        raise Unproven("collects a list of results: no rule for such a Loop")
    return tuple(carried)


def _refuse_blind(call: Call, body: object, carried: list[Value]) -> None:
    """Walk one turn for its condition: a loop that runs until the images say stop is mixed."""
    given = [Fixed(()), Fixed(()), *carried]
    condition_of(call.enter(body, given)[0], "the condition to go on")  # type: ignore[arg-type]


RULES: Table = {("", "If"): if_, ("", "Loop"): loop}
