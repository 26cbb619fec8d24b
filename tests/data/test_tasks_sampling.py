"""Batches and folds as pure functions: everything comes once an epoch, classes equally often where that is asked."""

from collections import Counter

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from minillm.config import UserError
from minillm.data.sampling import balanced, class_weights, k_folds, learnable, shuffled

CLASSES = np.array([0] * 3 + [2] * 40 + [5] * 17)


def test_an_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    epochs = [tuple(shuffled(np.arange(n, n + 60), 60, seed=3)) for n in (0, 60)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != tuple(shuffled(np.arange(60), 60, seed=4))
    assert tuple(shuffled(np.arange(50, 70), 60, seed=3)) == epochs[0][50:] + epochs[1][:10]


def test_balanced_samples_have_every_class_equally_often() -> None:
    chosen = balanced(np.arange(300), CLASSES, seed=7)
    for first in range(0, 300, 3):
        assert sorted(CLASSES[chosen[first : first + 3]]) == [0, 2, 5]
    first_classes = Counter(CLASSES[chosen[::3]].tolist())  # no class is always the first
    assert min(first_classes.values()) > 20
    times = Counter(chosen[CLASSES[chosen] == 2].tolist())  # 100 draws from 40
    assert len(times) == 40 and set(times.values()) == {2, 3}
    assert balanced(np.arange(120, 130), CLASSES, seed=7).tolist() == chosen[120:130].tolist()
    other = balanced(np.arange(300), CLASSES, seed=8)
    assert other.tolist() != chosen.tolist()
    assert CLASSES[other].tolist() != CLASSES[chosen].tolist()  # nor do the classes take the same turns


def test_class_weights_are_scikit_learns() -> None:
    counts = np.array([3, 40, 17])
    expected = compute_class_weight("balanced", classes=np.array([0, 2, 5]), y=CLASSES)
    np.testing.assert_allclose(class_weights(counts), expected)
    assert (class_weights(counts) * counts).sum() == pytest.approx(60)
    with pytest.raises(UserError, match="class 1 of 3 has no example"):
        class_weights(np.array([3, 0, 1]))


@pytest.mark.parametrize("classes", [None, CLASSES])
def test_every_example_is_held_out_once(classes: np.ndarray | None) -> None:
    folds = k_folds(60, 7, seed=1, classes=classes)
    assert sorted(np.concatenate([held for _, held in folds]).tolist()) == list(range(60))
    for train, held in folds:
        assert sorted([*train, *held]) == list(range(60))
        assert len(held) in (8, 9)
        if classes is not None:
            for label, count in ((0, 3), (2, 40), (5, 17)):
                assert abs((classes[held] == label).sum() - count / 7) < 1
    other = k_folds(60, 7, seed=2, classes=classes)
    assert folds[0][1].tolist() != other[0][1].tolist()
    with pytest.raises(UserError, match="61 folds of 60"):
        k_folds(60, 61, seed=1)


def test_examples_of_one_group_are_held_out_together() -> None:
    groups = np.arange(60) // 3  # 20 groups of three
    folds = k_folds(60, 5, seed=1, groups=groups)
    assert sorted(np.concatenate([held for _, held in folds]).tolist()) == list(range(60))
    for train, held in folds:
        assert len(held) == 12 and not set(groups[train]) & set(groups[held])
    with pytest.raises(UserError, match="21 folds of 20"):
        k_folds(60, 21, seed=1, groups=groups)


def test_groups_are_spread_by_the_class_of_their_first() -> None:
    groups, classes = np.repeat(np.arange(10), 2), np.repeat([0] * 8 + [1] * 2, 2)
    for _, held in k_folds(20, 2, seed=1, classes=classes, groups=groups):
        assert sorted(classes[held].tolist()) == [0] * 8 + [1] * 2


def test_what_only_held_out_examples_have_is_learnt() -> None:
    """The first of the two z and the only q are trained on; then the other z can be scored."""
    names = [("a",), ("a", "b"), ("z",), ("b",), ("q", "a"), ("z", "a"), ()]
    train, held = learnable((np.array([0, 1]), np.array([2, 3, 4, 5, 6])), names)
    assert train.tolist() == [0, 1, 2, 4] and held.tolist() == [3, 5, 6]
    assert learnable((np.array([4]), np.array([0, 1])), [("b",), ("a",), (), (), ("a",)])[0].tolist() == [0, 4]
