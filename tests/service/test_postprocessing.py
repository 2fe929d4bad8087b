"""Logits to labels, against SciPy's softmax and a plain sort."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from service.postprocessing import FEW_CLASSES, top_k

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


def labels_of(logits) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(len(logits)))


@given(st.lists(FLOATS, min_size=1, max_size=50))
def test_scores_are_scipys_softmax(values):
    logits = np.array(values, np.float32)

    scores = {one.index: one.score for one in top_k(logits, labels_of(logits), len(logits))}

    expected = softmax(logits.astype(np.float64))
    # exp and the sum of up to 50 terms, each rounded once: under 60 units in the last place of a double
    np.testing.assert_allclose([scores[index] for index in range(len(logits))], expected, rtol=60 * 2**-52, atol=1e-300)


@given(st.lists(FLOATS, min_size=1, max_size=50), st.integers(1, 60))
def test_the_k_largest_come_first_and_ties_by_index(values, k):
    logits = np.array(values, np.float32)

    answer = [one.index for one in top_k(logits, labels_of(logits), k)]

    assert answer == sorted(range(len(logits)), key=lambda index: (-logits[index], index))[:k]


@pytest.mark.parametrize("classes", [FEW_CLASSES, FEW_CLASSES + 1, 1000])
def test_many_classes_are_ranked_as_few_are(classes):
    logits = np.random.default_rng(0).integers(-5, 5, classes).astype(np.float32)  # with many ties

    answer = [one.index for one in top_k(logits, labels_of(logits), classes)]

    assert answer == sorted(range(classes), key=lambda index: (-logits[index], index))


@given(st.lists(FLOATS, min_size=1, max_size=50))
def test_scores_are_probabilities(values):
    logits = np.array(values, np.float32)

    scores = [one.score for one in top_k(logits, labels_of(logits), len(logits))]

    assert all(0 <= score <= 1 for score in scores)
    assert sum(scores) == pytest.approx(1, abs=50 * 2**-52)


def test_order_follows_logits_where_scores_underflow_to_ties():
    logits = np.array([-2000, 0, -1000], np.float32)

    assert [one.index for one in top_k(logits, labels_of(logits), 3)] == [1, 2, 0]


def test_labels_go_with_their_index():
    answer = top_k(np.array([0, 5, 1], np.float32), ("cat", "dog", "owl"), 2)

    assert [(one.label, one.index) for one in answer] == [("dog", 1), ("owl", 2)]


def test_huge_logits_do_not_overflow():
    assert top_k(np.array([3e38, -3e38], np.float32), ("yes", "no"), 1)[0].score == 1.0
