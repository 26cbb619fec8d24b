"""The baselines by hand, on data small enough to see through."""

import numpy as np
import pytest

from minillm.evaluation.trivial import commonest, commonest_tags, majority_class, mean_value


def test_the_commonest_class_and_labels() -> None:
    assert majority_class(np.array([2, 0, 2, 1]), 3).tolist() == [2, 2, 2]
    labels = np.array([[1, 0, 1], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    assert majority_class(labels, 2).tolist() == [[1, 0, 0], [1, 0, 0]]  # half is not more than half
    assert mean_value([1.0, 2.0, 6.0], 2).tolist() == [3.0, 3.0]


def test_each_word_has_its_commonest_tag() -> None:
    words = [["the", "run", "was", "long"], ["I", "run"], ["run", "far"]]
    tags = [["O", "N", "O", "O"], ["O", "V"], ["V", "O"]]
    assert commonest_tags(words, tags, [["run", "the", "fox"], []]) == [["V", "O", "O"], []]


def test_the_commonest_text() -> None:
    assert commonest(["b", "", "b", ""]) == ""
    assert commonest(["b", "a", "b"]) == "b"
    for baseline in (commonest, lambda train: majority_class(train, 1), lambda train: mean_value(train, 1)):
        with pytest.raises(ValueError, match="no training example"):
            baseline([])
