"""What a model must beat to have learnt anything from its input: answers that do not look at it, or hardly.

classify   the commonest class of the training data; several labels: those that more than half have
regress    the training data's mean
tag        each word's commonest tag, the commonest of all for a word never seen
seq2seq    the commonest target
span-qa    no answer where that is right more often, else the commonest answer
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np


def majority_class(train: np.ndarray, size: int) -> np.ndarray:
    """Training classes [N], or labels [N, L] of 0 and 1 -> `size` equal predictions [size] or [size, L]."""
    train = _some(np.asarray(train))
    best = (train.mean(0) > 0.5).astype(np.int64) if train.ndim == 2 else np.bincount(train).argmax()
    return np.broadcast_to(best, (size, *np.shape(best))).copy()


def mean_value(train: np.ndarray, size: int) -> np.ndarray:
    """Training numbers [N] -> their mean [size]."""
    return np.full(size, _some(np.asarray(train, np.float64)).mean())


def commonest_tags(
    words: Sequence[Sequence[str]], tags: Sequence[Sequence[str]], asked: Sequence[Sequence[str]]
) -> list[list[str]]:
    """The tags of the sentences `asked`, by what the words of the training sentences were tagged most often."""
    of_word: dict[str, Counter] = defaultdict(Counter)
    for sentence, its_tags in zip(words, tags, strict=True):
        for word, tag in zip(sentence, its_tags, strict=True):
            of_word[word][tag] += 1
    best = {word: commonest(list(counts.elements())) for word, counts in of_word.items()}
    default = commonest([tag for its_tags in tags for tag in its_tags])
    return [[best.get(word, default) for word in sentence] for sentence in asked]


def commonest(train: Sequence[str]) -> str:
    """The text that occurs most often; of those that do equally, the first in the alphabet.

    For span-qa give the first golden answer of each question, "" where it has none. Raises ValueError for none at all.
    """
    counts = Counter(_some(train))
    return min(counts, key=lambda text: (-counts[text], text))


def _some(train):
    if not len(train):
        raise ValueError("there is no training example to take a baseline from; give one or more")
    return train
