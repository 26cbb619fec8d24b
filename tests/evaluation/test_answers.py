"""Exact match and F1 against values worked out by hand from the official scripts' rules."""

import numpy as np
import pytest

from minillm.evaluation.answers import answer_f1, answer_scores, best_null_threshold, exact_match, normalise


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("The  Cat's\tmeow!", "cats meow"),
        ("an U.S. Theatre", "us theatre"),  # no article inside a word
        ("a-an-the", "aanthe"),  # punctuation goes first, and then no article is left
        ("the", ""),
        ("«1,000»", "«1000»"),  # ASCII punctuation alone
    ],
)
def test_normalise(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_the_nearest_golden_answer_counts() -> None:
    golden = ["the big red dog", "Clifford"]
    assert exact_match("Clifford.", golden) == 1.0
    assert exact_match("red dog", golden) == 0.0
    assert answer_f1("a red dog barks", golden) == pytest.approx(2 * 2 / (3 + 3))
    assert answer_f1("dog dog", ["dog"]) == pytest.approx(2 / 3)  # words are a multiset
    assert answer_f1("cat", golden) == 0.0


def test_no_answer() -> None:
    assert exact_match("", []) == answer_f1("", []) == 1.0
    assert exact_match("dog", []) == answer_f1("dog", []) == 0.0
    assert answer_f1("", ["dog"]) == 0.0
    assert exact_match("", ["the", "!"]) == 1.0  # golden answers that normalise to nothing
    assert exact_match("", ["the", "dog"]) == 0.0


def test_means_over_questions_of_both_kinds() -> None:
    scores = answer_scores(["the dog", "red cat", "x", "", ""], [["dog"], ["cat"], [], [], []])
    assert scores["exact_match"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 0 + 1 + 1) / 5)
    assert scores["answerable_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["unanswerable_accuracy"] == pytest.approx(2 / 3)
    assert answer_scores(["dog"], [["dog"]]) == {"exact_match": 1.0, "f1": 1.0}
    with pytest.raises(ValueError, match="nothing to score"):
        answer_scores([], [])
    with pytest.raises(ValueError, match="1 answers to 2 questions"):
        answer_scores(["x"], [[], []])


def test_no_null_threshold_has_a_higher_f1() -> None:
    for seed in range(30):
        generator = np.random.default_rng(seed)
        golden = [["dog"] if generator.random() < 0.5 else [] for _ in range(20)]
        answers = [str(generator.choice(["dog", "cat", "red dog"])) for _ in golden]
        margins = np.round(generator.normal(size=20), 1)

        def f1(threshold: float, answers=answers, margins=margins, golden=golden) -> float:
            given = [a if m >= threshold else "" for a, m in zip(answers, margins, strict=True)]
            return answer_scores(given, golden)["f1"]

        threshold, best = best_null_threshold(answers, margins, golden)
        assert f1(threshold) == pytest.approx(best)
        assert best == pytest.approx(max(f1(t) for t in [-10.0, *margins, 10.0]))
    above = np.nextafter(1.0, 2.0)  # the middle rounds to 1.0, which would give both
    assert best_null_threshold(["x", "dog"], np.array([1.0, 1.0]), [["dog"], ["dog"]]) == (0.0, 0.5)  # both or none
    with pytest.raises(ValueError, match="1 answers, 2 margins, 1 questions"):
        best_null_threshold(["dog"], np.zeros(2), [[]])
    assert best_null_threshold(["dog", "dog"], np.array([above, 1.0]), [["dog"], []]) == (above, 1.0)
