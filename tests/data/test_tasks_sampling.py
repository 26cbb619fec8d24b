"""Batches and folds as pure functions: everything comes once an epoch, classes equally often where that is asked."""

from collections import Counter

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from minillm.config import UserError
from minillm.data.sampling import balanced, class_weights, hold_out, k_folds, shuffled

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


def test_a_tenth_is_held_out() -> None:
    train, held = hold_out(200, seed=1)
    assert len(held) == 20 and sorted([*train, *held]) == list(range(200))
    assert [len(part) for part in hold_out(2, seed=1)] == [1, 1]
    with pytest.raises(UserError, match="one example cannot be divided"):
        hold_out(1, seed=1)
