"""Exact match and F1 of answers, as SQuAD's official scripts count them (Rajpurkar et al. 2016, 2018).

    normalise: lower case; without ASCII punctuation; without the words a, an, the; white space to single spaces
    F1 = 2 P R / (P + R) over the words of both as multisets; the best over the golden answers counts

No answer is "". Where either side is empty, F1 is 1 if both are, else 0. Golden answers that normalise to nothing are
left out; a question that then has none is unanswerable.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """What of an answer is compared."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golden: Sequence[str]) -> float:
    """1 where the answer equals a golden one, normalised; else 0. No golden answers: 1 for ""."""
    return max(float(normalise(answer) == normalise(gold)) for gold in _golden(golden))


def answer_f1(answer: str, golden: Sequence[str]) -> float:
    """Overlap of words with the golden answer that is nearest, 0 … 1. No golden answers: 1 for ""."""
    return max(_f1(normalise(answer).split(), normalise(gold).split()) for gold in _golden(golden))


def answer_scores(answers: Sequence[str], golden: Sequence[Sequence[str]]) -> dict[str, float]:
    """exact_match and f1, means over the questions, 0 … 1 (the official scripts print them in per cent).

    Where questions of both kinds are there, also answerable_f1 and unanswerable_accuracy.

    Raises ValueError for lists of different lengths, or none at all.
    """
    if len(answers) != len(golden):
        raise ValueError(f"{len(answers)} answers to {len(golden)} questions; give one for each")
    if not answers:
        raise ValueError("there is nothing to score; give one question or more")
    exact = np.array([exact_match(answer, gold) for answer, gold in zip(answers, golden, strict=True)])
    f1 = np.array([answer_f1(answer, gold) for answer, gold in zip(answers, golden, strict=True)])
    scores = {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
    answerable = np.array([_golden(gold) != [""] for gold in golden])
    if answerable.any() and not answerable.all():
        scores["answerable_f1"] = float(f1[answerable].mean())
        scores["unanswerable_accuracy"] = float(exact[~answerable].mean())
    return scores


def best_null_threshold(
    answers: Sequence[str], margins: np.ndarray, golden: Sequence[Sequence[str]]
) -> tuple[float, float]:
    """(threshold, mean F1 there): answers whose score − null reaches it are given, and F1 is the highest possible.

    Args:
        margins: [N] score − null of each answer.

    Raises:
        ValueError: lists of different lengths, or none at all.
    """
    if not len(answers) == len(margins) == len(golden) or not answers:
        raise ValueError(
            f"{len(answers)} answers, {len(margins)} margins, {len(golden)} questions; give as many of each"
        )
    given = np.array([answer_f1(answer, gold) for answer, gold in zip(answers, golden, strict=True)])
    withheld = np.array([answer_f1("", gold) for gold in golden])
    order = np.argsort(-np.asarray(margins, np.float64), kind="stable")
    ranked = np.asarray(margins, np.float64)[order]
    total = withheld.sum() + np.concatenate([[0.0], np.cumsum((given - withheld)[order])])  # the first 0, 1, … answered
    whole = np.concatenate([[True], ranked[1:] < ranked[:-1], [True]])  # equal margins are answered together
    best = int(np.argmax(np.where(whole, total, -1.0)))
    above = ranked[best - 1] if best else ranked[0] + 2.0
    below = ranked[best] if best < len(ranked) else ranked[-1] - 2.0
    middle = float((above + below) / 2)
    return (middle if middle > below else float(above)), float(total[best] / len(answers))  # neighbouring floats round


def _golden(golden: Sequence[str]) -> list[str]:
    return [gold for gold in golden if normalise(gold)] or [""]


def _f1(answer: list[str], gold: list[str]) -> float:
    common = (Counter(answer) & Counter(gold)).total()
    return 2 * common / (len(answer) + len(gold)) if answer or gold else 1.0
