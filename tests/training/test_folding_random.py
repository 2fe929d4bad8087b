"""Random graphs of all pieces that folding knows: what can be folded is, what cannot stays, both compute the same."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from folding_oracle import float64, images_for, outputs, relative_error
from hypothesis import event, given, settings
from hypothesis import strategies as st

from benchmarks.fold_patterns import Sketch
from training.folding.graphs import fold_graph

TOLERANCE = 1e-10  # relative; sums here have at most 10³ terms, each rounded at 2⁻⁵³, and a wrong fold is off by 0.01


@dataclass
class Drawn:
    """A graph in the making, and how many of its BatchNorms must be folded or kept."""

    sketch: Sketch
    draw: st.DrawFn
    at: str = "images"
    must_fold: int = 0
    must_stay: int = 0
    side: int = 7
    seen: list[str] = field(default_factory=list)

    def yes(self) -> bool:
        return self.draw(st.booleans())

    def conv(self, x: str, *, pads: int = 1, outputs: int | None = None, transposed: bool = False) -> str:
        inputs = self.sketch.channels[x]
        groups = self.draw(st.sampled_from([one for one in (1, 2, inputs) if inputs % one == 0]))
        outputs = outputs or groups * self.draw(st.integers(1, 2))
        groups = groups if outputs % groups == 0 else 1
        padding = {"pads": [pads] * 2 * self.sketch.dims}
        return self.sketch.conv(x, outputs, 3, groups, bias=self.yes(), transposed=transposed, **padding)

    def norm(self, x: str, *, positive: bool = False) -> str:
        eps = 10 ** self.draw(st.floats(-7, -1))
        return self.sketch.norm(x, positive=positive, eps=eps)


def _passages(drawn: Drawn, x: str) -> tuple[str, bool]:
    """Add what a scale and shift pass; say whether they must be positive for that."""
    windows = {"kernel_shape": [3] * drawn.sketch.dims, "strides": [1] * drawn.sketch.dims}
    windows["pads"] = [1] * 2 * drawn.sketch.dims
    pools = {"AveragePool": windows, "MaxPool": windows} if drawn.sketch.dims < 3 else {}
    options = {"Identity": {}, "Dropout": {}, **pools}
    chosen = drawn.draw(st.lists(st.sampled_from(sorted(options)), max_size=2))
    for kind in chosen:
        x = drawn.sketch.node(kind, x, **options[kind])
    return x, "MaxPool" in chosen


def after_a_layer(drawn: Drawn) -> None:
    """Convolution or its transpose, passages, one or two BatchNorms."""
    x, positive = _passages(drawn, drawn.conv(drawn.at, transposed=drawn.yes()))
    for _ in range(drawn.draw(st.integers(1, 2))):
        x = drawn.norm(x, positive=positive)
        drawn.must_fold += 1
    drawn.at = x


def before_a_layer(drawn: Drawn) -> None:
    """BatchNorm, passages, a convolution that pads nothing."""
    positive = drawn.yes()
    x = drawn.norm(drawn.at, positive=positive)
    x = drawn.sketch.node("Identity", x) if drawn.yes() else x
    drawn.at = drawn.conv(x, pads=0)
    drawn.must_fold += 1
    drawn.side -= 2


def before_a_layer_that_pads(drawn: Drawn) -> None:
    """BatchNorm, and a convolution whose border would tell."""
    drawn.at = drawn.conv(drawn.norm(drawn.at))
    drawn.must_stay += 1


def after_a_concat(drawn: Drawn) -> None:
    """Two or three convolutions, side by side."""
    branches = [drawn.conv(drawn.at) for _ in range(drawn.draw(st.integers(2, 3)))]
    width = sum(drawn.sketch.channels[one] for one in branches)
    drawn.at = drawn.norm(drawn.sketch.node("Concat", *branches, channels=width, axis=1))
    drawn.must_fold += 1


def after_a_sum(drawn: Drawn) -> None:
    """Two convolutions, added or subtracted."""
    first, second = (drawn.conv(drawn.at, outputs=4) for _ in range(2))
    drawn.at = drawn.norm(drawn.sketch.node(drawn.draw(st.sampled_from(["Add", "Sub"])), first, second))
    drawn.must_fold += 1


def beside_another_reader(drawn: Drawn) -> None:
    """A convolution that is read past its BatchNorm."""
    x = drawn.conv(drawn.at)
    drawn.at = drawn.sketch.node("Mul", drawn.norm(x), drawn.sketch.node("Sigmoid", x))
    drawn.must_stay += 1


def spelled_out(drawn: Drawn) -> None:
    """A convolution and arithmetic with constants; nothing of it may be left."""
    x = drawn.conv(drawn.at)
    count = drawn.sketch.channels[x]
    for kind in drawn.draw(st.lists(st.sampled_from(["Mul", "Add", "Sub", "Div"]), min_size=1, max_size=4)):
        x = drawn.sketch.arithmetic(kind, x, drawn.sketch.rng.random(count) + 0.5)
    drawn.at = x


PIECES = (after_a_layer, before_a_layer, before_a_layer_that_pads, after_a_concat, after_a_sum, spelled_out)
PIECES += (beside_another_reader,)


@st.composite
def graphs(draw: st.DrawFn) -> Drawn:
    """Draw up to three pieces with a Sigmoid between, which nothing passes, and a head."""
    dims = draw(st.integers(1, 3))
    drawn = Drawn(Sketch(4, size=(7,) * dims, seed=draw(st.integers(0, 2**31))), draw)
    for piece in draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3)):
        drawn.at = drawn.sketch.node("Sigmoid", drawn.at)
        drawn.seen.append(piece.__name__)
        piece(drawn)
    if drawn.yes():
        x = drawn.sketch.node("Flatten", drawn.sketch.node("GlobalAveragePool", drawn.sketch.node("Sigmoid", drawn.at)))
        x = drawn.sketch.gemm(x, drawn.sketch.channels[drawn.at], bias=drawn.yes(), alpha=0.5, beta=2.0)
        drawn.at = drawn.norm(x)
        drawn.must_fold += 1
    return drawn


def test_what_can_be_folded_is_and_nothing_else_and_float64_agrees(record_property: pytest.FixtureRequest):
    counts: Counter[str] = Counter()

    @settings(max_examples=80, deadline=None)
    @given(graphs())
    def check(drawn: Drawn) -> None:
        model = drawn.sketch.model(drawn.at)
        folded = fold_graph(model)
        images = images_for(model)
        wanted = outputs(float64(model), images)
        assert relative_error(outputs(float64(folded.model, folded.exact), images), wanted) <= TOLERANCE
        left = sum(node.op_type == "BatchNormalization" for node in folded.model.graph.node)
        assert (left, len(folded.report.kept)) == (drawn.must_stay, drawn.must_stay), drawn.seen
        names = {record.norm for record in folded.report.folds if record.norm_kind == "BatchNormalization"}
        assert len(names) == drawn.must_fold
        if "spelled_out" in drawn.seen and "beside_another_reader" not in drawn.seen:
            assert not {"Mul", "Div"} & {node.op_type for node in folded.model.graph.node}
        counts.update(folded=len(names), all=len(names) + left, foldable=drawn.must_fold)
        event(f"{len(names)} folded, {left} kept")

    check()
    share = f"{counts['folded']} of {counts['foldable']} foldable BatchNorms folded, of {counts['all']} in all"
    record_property("folded share", share)  # type: ignore[operator] # a function, in the report of the run
    print(share)  # noqa: T201 # `pytest -rP` shows it
    assert counts["folded"] == counts["foldable"] > 0
