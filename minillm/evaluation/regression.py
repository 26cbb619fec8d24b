"""How near predicted numbers come.

Pearson's r = cov(x, y) / (σ_x σ_y);   Spearman's ρ = r of the ranks, equal values sharing the mean of theirs
"""

import numpy as np


def regression_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """pearson and spearman (NaN where a side is constant, as in scipy), rmse and mae in the labels' unit; [N] each.

    Raises ValueError for different lengths, no number at all, or a number that is not finite.
    """
    truth, predicted = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise ValueError(f"truth has the shape {truth.shape}, but the predictions {predicted.shape}; give [N] of each")
    if not len(truth):
        raise ValueError("there is no example to score")
    if not (np.isfinite(truth).all() and np.isfinite(predicted).all()):
        raise ValueError("a number is NaN or infinite; nothing can be correlated with it")
    error = predicted - truth
    return {
        "pearson": pearson(truth, predicted),
        "spearman": pearson(ranks(truth), ranks(predicted)),
        "rmse": float(np.sqrt((error**2).mean())),
        "mae": float(np.abs(error).mean()),
    }


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """r of x, y [N]; NaN where one of them is constant."""
    if (x == x[0]).all() or (y == y[0]).all():  # compared, since a constant's rounded deviations need not be 0
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)  # first, so that no product over- or underflows
    return float(np.clip(x @ y, -1.0, 1.0))


def ranks(values: np.ndarray) -> np.ndarray:
    """[N] ranks from 1; equal values have the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
