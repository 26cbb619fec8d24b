"""BLEU and ROUGE-L: how near written text comes to references.

    BLEU    = 100 · exp(min(0, 1 − r / h)) · (p₁ p₂ p₃ p₄)^¼                     (Papineni et al. 2002)
    ROUGE-L = F1 of P = lcs / words of the prediction, R = lcs / words of the reference   (Lin 2004)

p_n n-grams of the predictions that are in a reference, as often at most, over all n-grams of the predictions, summed
over the corpus; h words of the predictions, r of the reference nearest in length; lcs the longest common subsequence.
Counted as sacrebleu 2 does by default: words by the rules of mteval-v13a, exponential smoothing, effective order off.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

ORDER = 4

_ENTITIES = (("<skipped>", ""), ("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_SPLITS = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_WORD = re.compile(r"[a-z0-9]+")


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU in 0 … 100: sacrebleu's own where it is installed, else `bleu_reference`, which agrees with it.

    Args:
        references: for each prediction its references, one or more.

    Raises:
        ValueError: lists of different lengths, none at all, or a prediction without a reference.
    """
    _check(predictions, references)
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return bleu_reference(predictions, references)
    streams = [list(stream) for stream in zip_longest(*references)]  # None where one has fewer than another
    return float(BLEU(force=True).corpus_score(list(predictions), streams).score)


def bleu_reference(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The definition. Raises as `bleu`."""
    _check(predictions, references)
    right, total, length, nearest = [0] * ORDER, [0] * ORDER, 0, 0
    for prediction, several in zip(predictions, references, strict=True):
        words, wanted = words_13a(prediction), [words_13a(reference) for reference in several]
        length += len(words)
        nearest += min((abs(len(reference) - len(words)), len(reference)) for reference in wanted)[1]
        for n in range(ORDER):
            most: Counter = Counter()
            for reference in wanted:
                most |= _ngrams(reference, n + 1)
            found = _ngrams(words, n + 1)
            right[n] += (found & most).total()
            total[n] += found.total()
    return _bleu(right, total, length, nearest)


def _bleu(right: Sequence[int], total: Sequence[int], length: int, nearest: int) -> float:
    if not any(right) or not all(total):
        return 0.0
    logs, smooth = 0.0, 1
    for matches, grams in zip(right, total, strict=True):
        if matches == 0:  # the k-th order without a match counts as 1 / 2^k of one (Chen and Cherry 2014, method 3)
            smooth *= 2
        logs += math.log((matches or 1 / smooth) / grams)
    return 100 * math.exp(min(0.0, 1 - nearest / length) + logs / ORDER)


def words_13a(text: str) -> list[str]:
    """The words that BLEU counts: punctuation stands alone, but for points and commas inside numbers."""
    text = text.rstrip()
    for spelled, meant in _ENTITIES:
        text = text.replace(spelled, meant)
    text = f" {text} "
    for pattern, apart in _SPLITS:
        text = pattern.sub(apart, text)
    return text.split()


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over the predictions of the F1 with the nearest reference, 0 … 1.

    Words as in Google's rouge_score without stemming: lower case, stretches of a–z and 0–9. Raises as `bleu`.
    """
    _check(predictions, references)
    scores = []
    for prediction, several in zip(predictions, references, strict=True):
        words = _WORD.findall(prediction.lower())
        wanted = [_WORD.findall(reference.lower()) for reference in several]
        scores.append(max(2 * _common(words, ref) / max(len(words) + len(ref), 1) for ref in wanted))
    return sum(scores) / len(scores)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)  # of the words of `a` so far with the first j words of `b`
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def _ngrams(words: Sequence[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one for each")
    if not predictions:
        raise ValueError("there is nothing to score; give one text or more")
    if any(isinstance(several, str) or not several for several in references):
        raise ValueError("each prediction needs a list of one reference or more")
