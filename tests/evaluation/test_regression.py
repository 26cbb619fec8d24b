"""Correlations against scipy; perplexity and bits per byte by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from minillm.evaluation.language import language_scores
from minillm.evaluation.regression import ranks, regression_scores


@pytest.mark.parametrize("digits", [0, 1, 8])  # many equal values, some, none
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_correlations_are_scipys(digits: int, scale: float) -> None:
    for seed in range(10):
        generator = np.random.default_rng(seed)
        truth = np.round(generator.normal(size=31), digits)
        predicted = np.round(generator.normal(size=31) + 0.5 * truth, digits)
        scores = regression_scores(truth * scale, predicted)
        assert scores["pearson"] == pytest.approx(stats.pearsonr(truth, predicted).statistic)
        assert scores["spearman"] == pytest.approx(stats.spearmanr(truth, predicted).statistic)
        np.testing.assert_array_equal(ranks(truth), stats.rankdata(truth))


def test_errors_in_the_labels_unit() -> None:
    scores = regression_scores([1.0, 2.0, 3.0], [1.0, 4.0, 0.0])
    assert scores["rmse"] == pytest.approx(math.sqrt((0 + 4 + 9) / 3))
    assert scores["mae"] == pytest.approx(5 / 3)


def test_a_constant_correlates_with_nothing() -> None:
    scores = regression_scores([1.0, 2.0, 3.0], [0.1, 0.1, 0.1])
    assert math.isnan(scores["pearson"]) and math.isnan(scores["spearman"])
    assert scores["mae"] == pytest.approx(1.9)
    scores = regression_scores([1.0], [3.5])
    assert math.isnan(scores["pearson"]) and math.isnan(scores["spearman"])
    assert scores["mae"] == scores["rmse"] == 2.5


def test_what_cannot_be_scored_says_why() -> None:
    for truth, predicted, problem in [([], [], "no example"), ([1, 2], [1], "shape"), ([1, 2], [1, np.inf], "NaN")]:
        with pytest.raises(ValueError, match=problem):
            regression_scores(truth, predicted)
    with pytest.raises(ValueError, match="0 targets"):
        language_scores(1.0, targets=0, text_bytes=1)


def test_perplexity_and_bits_per_byte() -> None:
    """Eight equally likely tokens of three bytes: three bits a token, one a byte."""
    assert language_scores(math.log(8), targets=5, text_bytes=15) == pytest.approx(
        {"perplexity": 8.0, "bits_per_byte": 1.0}
    )
    assert language_scores(1000.0, targets=1, text_bytes=1)["perplexity"] == math.inf
