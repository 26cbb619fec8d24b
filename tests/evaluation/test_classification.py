"""Against scikit-learn, on random classes of every balance."""

import numpy as np
import pytest
from sklearn import metrics

from minillm.evaluation.classification import (
    accuracy,
    best_threshold,
    class_scores,
    classification_scores,
    confusion,
    multilabel_scores,
)


@pytest.mark.parametrize("classes, occurring, size", [(2, 2, 5), (3, 3, 200), (7, 4, 60), (5, 1, 9)])
def test_single_labels_are_counted_as_scikit_learn_counts_them(classes: int, occurring: int, size: int) -> None:
    for seed in range(10):
        generator = np.random.default_rng(seed)
        truth, predicted = generator.integers(occurring, size=size), generator.integers(occurring, size=size) ** 2 % 5
        predicted %= classes
        table = confusion(truth, predicted, classes)
        assert (table == metrics.confusion_matrix(truth, predicted, labels=range(classes))).all()
        scores = classification_scores(truth, predicted, classes)
        assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
        for average in ("macro", "micro"):
            expected = metrics.f1_score(truth, predicted, average=average, zero_division=0)
            assert scores[f"{average}_f1"] == pytest.approx(expected)
        expected = metrics.precision_recall_fscore_support(truth, predicted, labels=range(classes), zero_division=0)
        for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
            np.testing.assert_allclose(class_scores(table)[name], values)


def test_several_labels_are_counted_as_scikit_learn_counts_them() -> None:
    for seed in range(10):
        generator = np.random.default_rng(seed)
        truth, predicted = generator.random((2, 40, 5)) < np.array([0.0, 0.1, 0.4, 0.8, 1.0])
        scores = multilabel_scores(truth, predicted)
        assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
        for average in ("macro", "micro"):
            expected = metrics.f1_score(truth, predicted, average=average, zero_division=0)
            assert scores[f"{average}_f1"] == pytest.approx(expected)


@pytest.mark.parametrize("digits", [1, 2, 6])  # many equal scores, some, none
def test_no_threshold_has_a_higher_f1(digits: int) -> None:
    for seed in range(20):
        generator = np.random.default_rng(seed)
        truth = generator.random(50) < 0.2
        truth[seed] = True
        scores = np.round(generator.normal(size=50) + truth, digits)
        threshold, f1 = best_threshold(truth, scores)
        taken = scores >= scores[:, None]  # at each score as the threshold
        every = 2 * (taken & truth).sum(1) / (taken.sum(1) + truth.sum())
        assert f1 == pytest.approx(every.max())
        assert metrics.f1_score(truth, scores >= threshold) == pytest.approx(f1)


def test_a_threshold_lies_midway() -> None:
    assert best_threshold([1, 1, 0, 0], [0.9, 0.6, 0.2, 0.1]) == (pytest.approx(0.4), 1.0)
    threshold, f1 = best_threshold([1, 1], [0.5, 0.5])
    assert (threshold, f1) == (0.5, 1.0)
    above = np.nextafter(1.0, 2.0)  # the middle rounds to 1.0, which would take both
    assert best_threshold([1, 0], [above, 1.0]) == (above, 1.0)


def test_what_cannot_be_scored_says_why() -> None:
    with pytest.raises(ValueError, match="outside 0 … 1"):
        confusion([0, 2], [0, 1], 2)
    with pytest.raises(ValueError, match="outside 0 … 1"):
        confusion([-1, 0], [0, 1], 2)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        accuracy([0, 1], [0])
    with pytest.raises(ValueError, match="nothing to score"):
        accuracy([], [])
    with pytest.raises(ValueError, match="no example is positive"):
        best_threshold([0, 0], [0.1, 0.2])
    with pytest.raises(ValueError, match="NaN"):
        best_threshold([0, 1], [0.1, np.nan])
