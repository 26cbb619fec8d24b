"""Which examples make up which batch and which fold: pure functions of a seed, so that a resumed run reads on.

    class weight      w_c = N / (C · N_c)          (King and Zeng 2001; scikit-learn's "balanced")

N examples, N_c of class c, C classes.
"""

from collections.abc import Collection, Sequence

import numpy as np

from minillm.config import UserError
from minillm.data.loader import order


def shuffled(samples: np.ndarray, size: int, *, seed: int) -> np.ndarray:
    """The example at each place of a run: all `size` of them in each epoch, in an order of its own.

    Args:
        samples: [B] numbers in the order of training, from 0.
    """
    epoch, position = np.divmod(samples, size)
    return order(position, seed=seed, epoch=epoch, size=size)


def balanced(samples: np.ndarray, classes: np.ndarray, *, seed: int) -> np.ndarray:
    """As `shuffled`, with every class equally often: each C samples in a row hold one of each class.

    A class with fewer examples comes around sooner; within a class each example comes once before any comes twice.

    Args:
        samples: [B] numbers in the order of training, from 0.
        classes: [N] class of each example; classes without an example take no part.
    """
    present = np.unique(classes)
    turn = shuffled(samples, len(present), seed=~seed)
    draw = samples // len(present)  # how often each class came before
    chosen = np.empty(len(samples), np.int64)
    for i, label in enumerate(present):
        members, mine = np.flatnonzero(classes == label), turn == i
        chosen[mine] = members[shuffled(draw[mine], len(members), seed=seed + 1 + i)]
    return chosen


def class_weights(counts: np.ndarray) -> np.ndarray:
    """[C] what an example of each class weighs, so that all classes together weigh the same; the mean over examples
    is 1. Raises `UserError` for a class without examples, whose weight would be infinite."""
    counts = np.asarray(counts)
    if not counts.all():
        raise UserError(
            f"class {int(np.argmin(counts != 0))} of {len(counts)} has no example to weigh; leave the label out"
        )
    return counts.sum() / (len(counts) * counts)


Fold = tuple[np.ndarray, np.ndarray]
"""(indices to train on, indices held out), both sorted."""


def k_folds(
    size: int, folds: int, *, seed: int, classes: np.ndarray | None = None, groups: np.ndarray | None = None
) -> list[Fold]:
    """Every example is held out in one fold and trained on in all others.

    Args:
        classes: [size] with them every fold has, within one example, its share of each class.
        groups: [size] numbers; examples of the same number are held out together, and count as one with the class of
            their first.

    Raises:
        UserError: fewer than two folds, or fewer examples (or groups) than folds.
    """
    if groups is not None:
        _, first, group = np.unique(groups, return_index=True, return_inverse=True)
        parts = k_folds(len(first), folds, seed=seed, classes=None if classes is None else np.asarray(classes)[first])
        return [(np.flatnonzero(np.isin(group, a)), np.flatnonzero(np.isin(group, b))) for a, b in parts]
    if not 2 <= folds <= size:
        raise UserError(f"{folds} folds of {size} examples cannot be made; choose 2 to {size} folds")
    mixed = order(np.arange(size), seed=seed, epoch=np.zeros(size), size=size)
    if classes is not None:
        mixed = mixed[np.argsort(np.asarray(classes)[mixed], kind="stable")]
    fold_of = np.empty(size, np.int64)
    fold_of[mixed] = np.arange(size) % folds
    return [(np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)) for fold in range(folds)]


def learnable(fold: Fold, names: Sequence[Collection[str]]) -> Fold:
    """The fold without held-out examples that have a name which occurs nowhere in training: those are trained on.

    Args:
        names: [size] what each example can only be right about if training has it too: its labels.
    """
    train, held = fold
    known = {name for i in train for name in names[i]}
    stay = []
    for i in held:
        if known.issuperset(names[i]):
            stay.append(i)
        known.update(names[i])
    stays = np.array(stay, np.int64)
    return np.sort(np.concatenate([train, np.setdiff1d(held, stays)])), stays
