"""How well classes are told apart.

    precision_c = TP_c / (TP_c + FP_c)     recall_c = TP_c / (TP_c + FN_c)     F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c)

    macro F1: the mean of F1_c; micro F1: F1 of the summed TP, FP, FN

As scikit-learn counts them: F1 is 0 where its denominator is, and macro takes the classes that occur in the truth or in
the predictions. N examples, C classes; TP true positives, FP false positives, FN false negatives.
"""

from collections.abc import Sequence

import numpy as np


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """[C, C] how many examples of class (row) were taken for class (column).

    Raises ValueError for lists of different lengths, none at all, or a class outside 0 … classes − 1.
    """
    truth, predicted = _pair(truth, predicted)
    if min(truth.min(), predicted.min()) < 0 or max(truth.max(), predicted.max()) >= classes:
        raise ValueError(f"a class lies outside 0 … {classes - 1}; give the number of all classes")
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Share of the examples that are right; of multi-label data [N, C] those with every label right."""
    truth, predicted = _pair(truth, predicted)
    return float((truth == predicted).reshape(len(truth), -1).all(1).mean())


def class_scores(table: np.ndarray) -> dict[str, np.ndarray]:
    """Of a confusion matrix [C, C]: precision, recall, f1 and support (examples of the class), [C] each."""
    return _scores(np.diag(table), table.sum(0) - np.diag(table), table.sum(1) - np.diag(table))


def classification_scores(truth: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
    """accuracy, macro_f1 and micro_f1 of single labels [N]; micro F1 is the accuracy here. Raises as `confusion`."""
    table = confusion(truth, predicted, classes)
    occurs = (table.sum(0) + table.sum(1)) > 0
    right = float(np.trace(table) / table.sum())
    return {"accuracy": right, "macro_f1": float(class_scores(table)["f1"][occurs].mean()), "micro_f1": right}


def multilabel_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """accuracy (every label of an example right), macro_f1 over all C labels and micro_f1 of [N, C] zeros and ones.

    Raises ValueError for arrays of different shapes, or empty ones.
    """
    truth, predicted = _pair(truth, predicted)
    truth, predicted = truth.astype(bool), predicted.astype(bool)
    counts = (truth & predicted).sum(0), (~truth & predicted).sum(0), (truth & ~predicted).sum(0)
    micro = _scores(*(np.array([count.sum()]) for count in counts))["f1"][0]
    macro = _scores(*counts)["f1"].mean()
    return {"accuracy": accuracy(truth, predicted), "macro_f1": float(macro), "micro_f1": float(micro)}


def best_threshold(truth: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """(threshold, F1 there): examples that score it or more are taken for positive, and F1 is the highest possible.

    The threshold lies midway between two neighbouring scores, where another sample would least likely cross it. Ties
    go to the higher one. Tune it on data that the model was not trained on.

    Args:
        truth: [N] zeros and ones.
        scores: [N], the higher the more likely positive.

    Raises:
        ValueError: different lengths, none at all, scores that are not finite, or no positive example.
    """
    truth, scores = _pair(truth, scores)
    if not np.isfinite(scores).all():
        raise ValueError("a score is NaN or infinite; no threshold can be chosen")
    if not truth.any():
        raise ValueError("no example is positive, so no threshold can be chosen; give validation data that has some")
    order = np.argsort(-scores, kind="stable")
    ranked, right = scores[order], np.cumsum(truth[order].astype(bool))
    f1 = 2 * right / (np.arange(1, len(ranked) + 1) + right[-1])  # of taking the first 1, 2, … as positive
    whole = np.append(ranked[1:] < ranked[:-1], True)  # equal scores are taken together
    best = int(np.argmax(np.where(whole, f1, -1.0)))
    below = ranked[best + 1] if best + 1 < len(ranked) else ranked[best]
    middle = float((ranked[best] + below) / 2)
    return (middle if middle > below else float(ranked[best])), float(f1[best])  # halves of neighbouring floats round


def _scores(right: np.ndarray, wrong: np.ndarray, missed: np.ndarray) -> dict[str, np.ndarray]:
    """[C] counts TP, FP, FN -> [C] scores."""
    return {
        "precision": right / np.maximum(right + wrong, 1),
        "recall": right / np.maximum(right + missed, 1),
        "f1": 2 * right / np.maximum(2 * right + wrong + missed, 1),
        "support": right + missed,
    }


def _pair(truth: Sequence | np.ndarray, predicted: Sequence | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape:
        raise ValueError(f"truth has the shape {truth.shape}, but the predictions {predicted.shape}")
    if not truth.size:
        raise ValueError("there is nothing to score; give one example or more")
    return truth, predicted
