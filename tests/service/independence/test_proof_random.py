"""Random graphs against real runs: what the proof passes, no run refutes; what keeps images apart, the proof
passes.

The oracle is ONNX Runtime. That it has teeth is tested too: broken rules are found out, and mixing pieces are
seen.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from proof_cases.keeping import KEEPING
from proof_cases.mixing import MIXING
from proof_cases.oracle import refutation
from proof_cases.pieces import SIDE, Builder, Piece
from proof_cases.wild import wild_graphs

from service.independence.proof import prove
from service.independence.proof.call import Call, Rule
from service.independence.proof.extents import Times
from service.independence.proof.rules import RULES
from service.independence.proof.values import Images, Value

OPSETS = (12, 13, 14, 17, 18, 20)  # 12: Einsum; below it the pieces would need a third form of everything
GRAPHS = 200


@dataclass(frozen=True, slots=True)
class Drawn:
    """A random graph and the pieces it was built from."""

    pieces: tuple[Piece, ...]
    model: onnx.ModelProto
    channels: int

    @property
    def keeps(self) -> bool:
        """Whether it keeps images apart by construction."""
        return all(piece in KEEPING for piece in self.pieces)

    def refutation(self) -> str | None:
        """How a run refutes that it keeps images apart."""
        return refutation(self.model, (self.channels, SIDE, SIDE))


def build(pieces: tuple[Piece, ...], opset: int, channels: int = 4, seed: int = 0, head: int = 0) -> Drawn:
    """The pieces one after another, then a head that makes one row an image."""
    builder = Builder(opset, channels, np.random.default_rng(seed))
    name = "x"
    for piece in pieces:
        name = piece(builder, name)
    return Drawn(pieces, builder.model(_head(builder, name, head)), channels)


def _head(b: Builder, x: str, kind: int) -> str:
    if kind == 0:
        return str(b.add("Gemm", b.add("Flatten", b.add("GlobalAveragePool", x)), b.normal(b.channels, 3)))
    if kind == 1:
        return b.reduce("Mean", x, [2, 3], keepdims=0)
    if kind == 2:
        return str(b.add("MatMul", b.reshape(x, -1, b.channels * SIDE * SIDE), b.normal(b.channels * SIDE**2, 3)))
    return x


@st.composite
def graphs(draw: st.DrawFn) -> Drawn:
    """One to five pieces; half of the graphs hold one that mixes, somewhere."""
    pieces = draw(st.lists(st.sampled_from(KEEPING), min_size=1, max_size=5))
    if draw(st.booleans()):
        place = draw(st.integers(0, len(pieces)))
        pieces = [*pieces[:place], draw(st.sampled_from(MIXING)), *pieces[place:]]
    return build(
        tuple(pieces),
        draw(st.sampled_from(OPSETS)),
        draw(st.sampled_from([2, 4, 6])),
        draw(st.integers(0, 2**16)),
        draw(st.integers(0, 3)),
    )


def check_random_graphs(rules: Mapping[tuple[str, str], Rule], count: int) -> Counter[str]:
    """Prove and run `count` random graphs; fail where a run refutes a proof. Returns what was seen."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(graphs())
    def check(drawn: Drawn) -> None:
        proved = prove(drawn.model, rules).verdict == "independent"
        refuted = drawn.refutation()
        kind = "keeping" if drawn.keeps else "mixing"
        seen.update([kind] + [f"{kind}, proved"] * proved + [f"{kind}, refuted"] * (refuted is not None))
        assert not (proved and refuted), f"proved, but {refuted}: {[piece.__name__ for piece in drawn.pieces]}"

    check()
    return seen


def check_wild_graphs(rules: Mapping[tuple[str, str], Rule], count: int) -> Counter[str]:
    """The same for wild graphs, of which nothing is known but what the proof and the run say."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(wild_graphs(OPSETS))
    def check(model: onnx.ModelProto) -> None:
        found = prove(model, rules)
        refuted = refutation(model, (2, 4, 3))
        seen.update(["run", found.verdict] + ["refuted"] * (refuted is not None))
        seen.update(["proved"] * (found.verdict == "independent"))
        assert found.verdict != "independent" or refuted is None, f"proved, but {refuted}"

    check()
    return seen


def test_no_run_refutes_a_proof_and_most_of_what_keeps_images_apart_is_proved() -> None:
    seen = check_random_graphs(RULES, GRAPHS)
    assert seen["keeping"] >= GRAPHS // 4, seen
    assert seen["keeping, refuted"] == 0, seen  # else the oracle or a piece is wrong
    assert seen["keeping, proved"] * 2 >= seen["keeping"], seen
    assert seen["mixing"] >= GRAPHS // 4, seen
    assert seen["mixing, refuted"] * 10 >= seen["mixing"] * 8, seen  # a later piece may drown what was mixed


def test_no_run_refutes_a_proof_about_wild_graphs() -> None:
    seen = check_wild_graphs(RULES, 2 * GRAPHS)
    assert seen["proved"] * 8 >= seen["run"], seen  # else nothing was tried
    assert seen["refuted"] * 4 >= seen["run"], seen


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("piece", KEEPING, ids=lambda piece: piece.__name__)
def test_each_keeping_piece_is_proved_and_survives_its_run(piece: Piece, opset: int) -> None:
    drawn = build((piece,), opset, head=3)
    found = prove(drawn.model)
    assert found.verdict == "independent", found
    assert drawn.refutation() is None


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("piece", MIXING, ids=lambda piece: piece.__name__)
def test_each_mixing_piece_is_refused_and_refuted_by_its_run(piece: Piece, opset: int) -> None:
    drawn = build((piece,), opset, head=3)
    assert prove(drawn.model).verdict == "mixed"
    assert drawn.refutation() is not None


def first_input(call: Call) -> Value:
    """A wrong rule: whatever it is, it keeps images apart."""
    return call.images()


def careless_reshape(call: Call) -> Value:
    """A wrong rule: wherever N stands in the target, the images are there."""
    images, wanted = call.images(), call.extents(1)
    rest = [extent for extent in wanted if isinstance(extent, int) and extent > 0]
    total = int(np.prod([dim or 1 for dim in images.share]))
    place = next(index for index, extent in enumerate(wanted) if extent == -1 or isinstance(extent, Times))
    share = [1 if index == place else int(extent) for index, extent in enumerate(wanted)]  # type: ignore[arg-type]
    share[place] = total // int(np.prod(rest))
    return Images(place, tuple(share), outer=1)


def careless_reduction(call: Call) -> Value:
    """A wrong rule: a reduction with kept axes never touches the batch."""
    images = call.images()
    return images if call.attribute("keepdims", 1) else RULES["", call.operator](call)


def careless_gather(call: Call) -> Value:
    """A wrong rule: picking one row leaves one row an image."""
    images = call.operand(0)
    return images if isinstance(images, Images) and call.attribute("axis", 0) == 0 else RULES["", "Gather"](call)


BROKEN: dict[str, dict[tuple[str, str], Rule]] = {
    "Softmax": {("", "Softmax"): first_input},
    "CumSum": {("", "CumSum"): first_input},
    "Slice": {("", "Slice"): first_input},
    "TopK": {("", "TopK"): lambda call: (call.images(), call.images())},
    "BatchNormalization": {("", "BatchNormalization"): lambda call: (call.images(),) * 3},
    "Reshape": {("", "Reshape"): careless_reshape},
    "ReduceMean": {("", "ReduceMean"): careless_reduction},
    "Gather": {("", "Gather"): careless_gather},
    "RandomNormalLike": {("", "RandomNormalLike"): first_input},
    "DynamicQuantizeLinear": {("", "DynamicQuantizeLinear"): lambda call: (call.images(), *[_scalar()] * 2)},
    "LpNormalization": {("", "LpNormalization"): first_input},
}


def _scalar() -> Value:
    from service.independence.proof.values import constant

    return constant(np.float32(1))


def careless_sum(call: Call) -> Value:
    """A wrong rule: the first operand says where the images are."""
    images = [value for value in call.inputs if isinstance(value, Images)]
    return max(images, key=lambda value: value.rank)


@pytest.mark.parametrize("name", ["Reshape", "Softmax", "Add"])
def test_a_broken_rule_is_found_out_by_wild_graphs(name: str) -> None:
    broken = {"Reshape": careless_reshape, "Softmax": first_input, "Add": careless_sum}[name]
    with pytest.raises(AssertionError, match="proved, but"):
        check_wild_graphs({**RULES, ("", name): broken}, 1500)


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_is_found_out(broken: dict[tuple[str, str], Rule]) -> None:
    with pytest.raises(AssertionError, match="proved, but"):
        check_random_graphs({**RULES, **broken}, 1500)
