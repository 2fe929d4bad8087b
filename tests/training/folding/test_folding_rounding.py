"""A fold is judged by what rounding costs at its place: an amplifying network passes, a wrong fold does not."""

import numpy as np
import onnx
import pytest
from foreign_support import FILTERS, SIDE, Graph
from onnx import TensorProto

from training.errors import NotFoldable
from training.folding.graphs import fold_unmeasured, measure
from training.folding.rounding import TOLERANCE, refuse_wrong

FEEDS = {"x": np.random.default_rng(0).standard_normal((2, 3, SIDE, SIDE)).astype(np.float32)}


def amplifying() -> onnx.ModelProto:
    """A convolution whose outputs lie 10⁷ deviations from 0: subtracting the mean costs seven digits, folded or not."""
    return Graph(
        conv_bias=True,
        values={"conv_bias": np.full(FILTERS, 1e7), "mean": np.full(FILTERS, 1e7), "beta": np.zeros(FILTERS)},
    ).model()


def test_rounding_that_the_network_itself_amplifies_is_no_wrong_fold():
    model = amplifying()
    folded = measure(model, fold_unmeasured(model), FEEDS)
    (record,) = folded.report.folds
    assert record.error is not None
    assert record.error > TOLERANCE, "the network does not amplify enough to show anything"
    assert record.error < 1e7 * 2**-53 * 100


@pytest.mark.parametrize("model", [Graph().model(), amplifying()], ids=["plain", "amplifying"])
def test_a_fold_worse_than_its_rounding_is_refused_in_any_network(model: onnx.ModelProto):
    folded = fold_unmeasured(model)
    (filters,) = [values for values in folded.exact.values() if values.ndim == 4]
    filters[2] *= 1 + 1e-6
    with pytest.raises(NotFoldable, match="is rounding"):
        measure(model, folded, FEEDS)


def test_a_network_in_float16_is_held_to_float16s_roundoff():
    """Its own error is 2¹³ times that of float32 for the same amplification, and explains no more in float64."""
    values = {"conv_bias": np.full(FILTERS, 1e3), "mean": np.full(FILTERS, 1e3), "beta": np.zeros(FILTERS)}
    model = Graph(conv_bias=True, values=values, element_type=TensorProto.FLOAT16).model()
    feeds = {"x": FEEDS["x"].astype(np.float16)}
    measured = measure(model, fold_unmeasured(model), feeds).report.end_to_end
    assert measured is not None
    assert measured.float32_unfolded > 0.01, "the network does not amplify enough to show anything"
    folded = fold_unmeasured(model)
    (filters,) = [values for values in folded.exact.values() if values.ndim == 4]
    filters[2] *= 1 + 1e-9
    with pytest.raises(NotFoldable, match="at most 1e-10 is rounding"):
        measure(model, folded, feeds)


def test_the_message_names_the_type_that_was_measured():
    with pytest.raises(NotFoldable, match="float16 is 60% off float64 here"):
        refuse_wrong("norm", 1e-7, 0.6, np.dtype(np.float16))


@pytest.mark.parametrize("float32_error", [1e-7, float("nan"), 0.0])
def test_a_network_that_rounds_as_usual_is_held_to_the_tolerance(float32_error: float):
    refuse_wrong("norm", TOLERANCE, float32_error)
    with pytest.raises(NotFoldable, match=r"norm: folded and unfolded differ by 1\.1e-10 relative"):
        refuse_wrong("norm", 1.1e-10, float32_error)


def test_an_answer_that_rounding_has_eaten_is_told_so():
    with pytest.raises(NotFoldable, match="float32 is 60% off float64 here: the network amplifies rounding"):
        refuse_wrong("norm", 1e-7, 0.6)


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_an_error_that_is_no_number_is_refused(error: float):
    with pytest.raises(NotFoldable):
        refuse_wrong("norm", error, 1.0)
