"""Random graphs of all pieces that folding knows, through both front ends.

What can be folded is, what cannot stays, and folded and unfolded compute the same.
"""

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from folding_oracle import Joined, float64, images_for, outputs, relative_error
from hypothesis import event, given, settings
from hypothesis import strategies as st
from onnx import ModelProto
from training_support import relative_difference

from benchmarks.fold_modules import to_modules
from benchmarks.fold_sketch import Sketch
from training.folding.graphs import fold_unmeasured
from training.folding.modules import fold
from training.normalization import batch_norms

TOLERANCE = 1e-10  # relative; sums here have at most 10³ terms, each rounded at 2⁻⁵³, and a wrong fold is off by 0.01


@dataclass
class Drawn:
    """A graph in the making, and how many of its BatchNorms must be folded or kept."""

    sketch: Sketch
    draw: st.DrawFn
    at: str = "images"
    must_fold: int = 0
    must_stay: int = 0
    others: list[str] = field(default_factory=list)  # outputs beside the last value
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


def before_a_layer_that_pads_and_no_shift(drawn: Drawn) -> None:
    """BatchNorm that only scales, and a convolution with a border, which stays 0."""
    drawn.at = drawn.conv(drawn.sketch.norm(drawn.at, shift=False))
    drawn.must_fold += 1


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


def with_a_shared_weight(drawn: Drawn) -> None:
    """Two convolutions of one weight, and a BatchNorm behind one of them or behind each."""
    s, width = drawn.sketch, drawn.sketch.channels[drawn.at]
    weight = s.constant(s.rng.standard_normal((width, width, *[3] * s.dims)), f"shared{len(s.constants)}")
    first, second = (s.conv(drawn.at, width, weight=weight, bias=False, pads=[1] * 2 * s.dims) for _ in range(2))
    first, drawn.must_fold = drawn.norm(first), drawn.must_fold + 1
    if drawn.yes():
        second, drawn.must_fold = drawn.norm(second), drawn.must_fold + 1
    drawn.at = s.node("Mul", s.node("Sigmoid", first), s.node("Sigmoid", second))


def behind_what_nothing_passes(drawn: Drawn) -> None:
    """A convolution, a ReLU, or max-pooling and a negative scale, or a convolution that is an output too."""
    s, x = drawn.sketch, drawn.conv(drawn.at)
    kind = drawn.draw(st.sampled_from(["Relu", "MaxPool", "output"]))
    if kind == "output":
        drawn.others.append(x)
    elif kind == "Relu" or s.dims > 2:  # the reference pools along two axes at most
        x = s.node("Relu", x)
    else:
        x = s.node("MaxPool", x, kernel_shape=[3] * s.dims, strides=[1] * s.dims, pads=[1] * 2 * s.dims)
    drawn.at = drawn.norm(x)
    s.constants[s.nodes[-1].input[1]][0] = -1.0
    drawn.must_stay += 1


def _matmul(drawn: Drawn, x: str, inputs: int, outputs: int) -> str:
    s = drawn.sketch
    x = s.node("MatMul", x, s.constant(s.rng.standard_normal((inputs, outputs))), channels=outputs)
    return s.node("Add", x, s.constant(s.rng.standard_normal(outputs))) if drawn.yes() else x


def head(drawn: Drawn) -> None:
    """Pooling, a linear layer of either spelling, and BatchNorm behind it, or before it past the flattening."""
    s, width = drawn.sketch, drawn.sketch.channels[drawn.at]
    x = s.node("Sigmoid", drawn.at)
    if behind := drawn.yes():
        x = s.node("Flatten", s.node("GlobalAveragePool", x))
    else:
        x = s.node("Flatten", s.node("GlobalAveragePool", drawn.norm(x)))
    is_gemm = drawn.yes()
    x = s.gemm(x, width, bias=drawn.yes(), alpha=0.5, beta=2.0) if is_gemm else _matmul(drawn, x, width, 5)
    drawn.at = drawn.norm(x) if behind else x
    drawn.must_fold += 1


PIECES = (
    after_a_layer, before_a_layer, before_a_layer_that_pads, before_a_layer_that_pads_and_no_shift, after_a_concat,
    after_a_sum, spelled_out, beside_another_reader, with_a_shared_weight, behind_what_nothing_passes,
)  # fmt: skip


@st.composite
def graphs(draw: st.DrawFn) -> Drawn:
    """Draw up to three pieces with a Sigmoid between, which nothing passes, and a head."""
    dims, opset = draw(st.integers(1, 3)), draw(st.sampled_from([9, 11, 13, 17, 21]))
    drawn = Drawn(Sketch(4, size=(7,) * dims, seed=draw(st.integers(0, 2**31)), opset=opset), draw)
    for piece in draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3)):
        drawn.at = drawn.sketch.node("Sigmoid", drawn.at)
        drawn.seen.append(piece.__name__)
        piece(drawn)
    if drawn.yes():
        head(drawn)
    return drawn


def check_file(drawn: Drawn, model: ModelProto) -> int:
    """Fold the ONNX file, compare, and return how many BatchNorms went."""
    folded = fold_unmeasured(model)
    images = images_for(model)
    wanted = outputs(float64(model), images)
    assert relative_error(outputs(float64(folded.model, folded.exact), images), wanted) <= TOLERANCE
    left = sum(node.op_type == "BatchNormalization" for node in folded.model.graph.node)
    assert (left, len(folded.report.kept)) == (drawn.must_stay, drawn.must_stay), drawn.seen
    names = {record.norm for record in folded.report.folds if record.norm_kind == "BatchNormalization"}
    assert len(names) == drawn.must_fold
    if "spelled_out" in drawn.seen and not {"beside_another_reader", "with_a_shared_weight"} & {*drawn.seen}:
        assert not {"Mul", "Div"} & {node.op_type for node in folded.model.graph.node}
    return len(names)


def check_modules(drawn: Drawn, model: ModelProto) -> None:
    """Fold the same network of PyTorch modules, and compare."""
    network = Joined(to_modules(model)).double().eval()
    images = torch.from_numpy(images_for(model))
    with torch.no_grad():
        folded = fold(network, images)
        assert relative_difference(folded.module(images), network(images)) <= TOLERANCE
    assert len(list(batch_norms(folded.module))) == len(folded.kept) == drawn.must_stay, drawn.seen
    assert len({record.norm for record in folded.folds if record.norm_kind == "BatchNorm"}) == drawn.must_fold


def test_what_can_be_folded_is_and_nothing_else_and_float64_agrees(record_property: pytest.FixtureRequest):
    counts: Counter[str] = Counter()

    @settings(max_examples=200, deadline=None)
    @given(graphs(), st.booleans())
    def check(drawn: Drawn, half: bool) -> None:
        model = drawn.sketch.model(drawn.at, *drawn.others, half=half)
        folded = check_file(drawn, model)
        check_modules(drawn, model)
        counts.update(folded=folded, all=drawn.must_fold + drawn.must_stay, foldable=drawn.must_fold)
        event(f"{folded} folded, {drawn.must_stay} kept")

    check()
    share = f"{counts['folded']} of {counts['foldable']} foldable BatchNorms folded, of {counts['all']} in all"
    record_property("folded share", share)  # type: ignore[operator] # a function, in the report of the run
    print(share)  # noqa: T201 # `pytest -rP` shows it
    assert counts["folded"] == counts["foldable"] > 0
