"""One rule for each operator and each kind of input, and the choice between them.

images in          RULES            where does the batch axis go?
slot numbers in    slots.RULES      do they stay addresses?
batch size in      sizes.RULES      does it stay a shape?
constants only     constants        what is the value, or at least the shape?
"""

from collections.abc import Mapping
from types import MappingProxyType

from service.independence.proof.call import Call, Rule, Table
from service.independence.proof.refusals import Unproven
from service.independence.proof.rules import (
    chance,
    control,
    elementwise,
    layout,
    products,
    quantized,
    reductions,
    selection,
    sizes,
    slots,
    windows,
)
from service.independence.proof.rules.constants import of_constants
from service.independence.proof.values import Images, Sizes, Slots, Value, as_fixed

__all__ = ["RULES", "Table", "apply"]

FAMILIES = (elementwise, windows, reductions, layout, selection, products, quantized, chance, control)
RULES: Mapping[tuple[str, str], Rule] = MappingProxyType(
    {key: rule for family in FAMILIES for key, rule in family.RULES.items()}
    | {("", name): sizes.RULES[("", name)] for name in ("Shape", "Size", "ConstantOfShape", "Range")}
)
ASKED_ALWAYS = frozenset((*chance.RULES, *control.RULES))
"""Chance differs between runs, nested graphs see more than their inputs: constant inputs prove nothing."""


def apply(call: Call, rules: Mapping[tuple[str, str], Rule]) -> tuple[Value, ...]:
    """What is known of an operator's outputs. Raises Refusal."""
    domain = "" if call.node.domain == "ai.onnx" else call.node.domain
    key = (domain, call.operator)
    rule = _choose(key, call.inputs, rules)
    result = of_constants(call, has_rule=key in rules) if rule is None else rule(call)
    return result if isinstance(result, tuple) else (result,)


def _choose(
    key: tuple[str, str], inputs: tuple[Value | None, ...], rules: Mapping[tuple[str, str], Rule]
) -> Rule | None:
    """The rule for this operator on these inputs, or None where they are all constant."""
    if key in ASKED_ALWAYS or any(isinstance(value, Images) for value in inputs):
        if key not in rules:
            raise Unproven(f"cannot be followed: no rule for op {key[1]}")
        return rules[key]
    for kind, table in ((Slots, slots.RULES), (Sizes, sizes.RULES)):
        given = [value for value in inputs if isinstance(value, kind)]
        if given and key in table:
            return table[key]
        for value in given:
            as_fixed(value)
    return sizes.RULES[key] if key in _SHAPE_READERS else None


_SHAPE_READERS = frozenset((("", "Shape"), ("", "Size")))
