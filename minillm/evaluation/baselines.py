"""What a model must beat: the bits per byte that simple predictors and compressors need for the validation text.

    uniform    p(b) = 1 / V
    unigram    p(b) = (c(b) + 1) / (N + V)
    bigram     p(b | a) = w(a) c(ab) / c(a) + (1 − w(a)) p(b)

    c counts in N training tokens, V vocabulary; w depends on how often a was seen (its power of two).

The weights w are fitted by deleted interpolation (Jelinek and Mercer 1980): each training pair is predicted from the
counts without itself, and w maximises the likelihood of that (EM). Nothing of the validation text is used in fitting.
Predictors are scored on the targets that a model is scored on: every validation token but the first.
"""

import lzma
import math
import zlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np

COUNTED = 20_000_000  # training tokens that are counted at most: beyond it the bigram gains little, the sort costs much
COMPRESSED = 64 << 20  # bytes of text that are compressed at most: xz -9 takes about a second for two megabytes
_STRETCHES = 64
_SCORED = 1 << 20  # validation tokens that are scored at a time
_ROUNDS = 30  # of EM; the weights stand still to three digits after about ten


class Tokens(Protocol):
    """A `data.tokens.TokenStream`, or whatever else has a length and gives windows [length] of int64 ids."""

    def __len__(self) -> int: ...

    def window(self, start: int, length: int) -> np.ndarray: ...


def baselines(
    train: Tokens,
    val: Tokens,
    *,
    vocab_size: int,
    val_bytes: int,
    val_text: Iterable[bytes],
    counted: int = COUNTED,
) -> dict[str, float | int | str | None]:
    """The "baselines" event of metrics.jsonl: `…_loss` in nats per target, the others in bits per byte.

    Of a training stream longer than `counted`, 64 stretches spread evenly over it are counted. gzip and xz are None
    where the validation text is longer than 64 MB.

    Args:
        val_bytes: UTF-8 bytes of the validation text.
        val_text: these bytes, in blocks.
    """
    targets = len(val) - 1
    unigram, bigram = _score(Ngrams(_sample(train, counted), vocab_size), val)
    losses = {"uniform": math.log(vocab_size), "unigram": unigram / targets, "bigram": bigram / targets}
    to_bits = targets / math.log(2) / val_bytes
    gzip, xz = _compressed(val_text, val_bytes) if val_bytes <= COMPRESSED else (None, None)
    return {
        "event": "baselines",
        **{name: loss * to_bits for name, loss in losses.items()},
        "gzip": gzip,
        "xz": xz,
        "val_bytes": val_bytes,
        "val_targets": targets,
        **{f"{name}_loss": loss for name, loss in losses.items()},
    }


class Ngrams:
    """Counts of some training text and the weights fitted on them.

    Args:
        stretches: pieces of the stream [n] each; pairs are counted inside them.
    """

    def __init__(self, stretches: list[np.ndarray], vocab_size: int):
        V = self.vocab_size = vocab_size
        ones = sum(np.bincount(ids, minlength=V) for ids in stretches)
        self.unigram = (ones + 1) / (ones.sum() + V)  # [V]
        # Pairs as numbers a·V + b, sorted with their counts: a table [V, V] would not fit for a large vocabulary.
        keys = np.concatenate([ids[:-1] * V + ids[1:] for ids in stretches])
        self.pairs, self.pair_counts = np.unique(keys, return_counts=True)
        first, second = np.divmod(self.pairs, V)
        self.firsts = np.bincount(first, self.pair_counts, minlength=V).astype(
            np.int64
        )  # [V] how often a begins a pair
        self.weights = self._fit(first, ones[second] / (ones.sum() - 1 + V))

    def _fit(self, first: np.ndarray, unigram: np.ndarray) -> np.ndarray:
        """[V] w(a). `unigram` [pairs] is p(b) counted without the pair's own b."""
        count, seen = self.pair_counts, self.firsts[first]
        pair = (count - 1) / np.maximum(seen - 1, 1)
        group = np.frexp(seen)[1]  # 1 + the power of two below
        groups = int(np.frexp(self.firsts.max(initial=1))[1]) + 1
        total = np.maximum(np.bincount(group, count, groups), 1)
        weight = np.full(groups, 0.5)
        for _ in range(_ROUNDS):
            from_pair = weight[group] * pair
            share = from_pair / (from_pair + (1 - weight[group]) * unigram)
            weight = np.bincount(group, count * share, groups) / total
        weight = np.minimum(weight, total / (total + 1))  # never 1: an unseen pair is possible
        weight[0] = 0.0  # a never began a pair
        return weight[np.frexp(self.firsts)[1]]

    def probabilities(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids [n] -> (unigram [n − 1], bigram [n − 1]) probability of each token but the first."""
        first, second = ids[:-1], ids[1:]
        keys = first * self.vocab_size + second
        at = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        count = np.where(self.pairs[at] == keys, self.pair_counts[at], 0)
        unigram, weight = self.unigram[second], self.weights[first]
        return unigram, weight * count / np.maximum(self.firsts[first], 1) + (1 - weight) * unigram


def _score(ngrams: Ngrams, val: Tokens) -> tuple[float, float]:
    """Summed (unigram, bigram) loss in nats over every token of `val` but the first."""
    unigram_sum = bigram_sum = 0.0
    for start in range(0, len(val) - 1, _SCORED):
        unigram, bigram = ngrams.probabilities(val.window(start, min(_SCORED + 1, len(val) - start)))
        unigram_sum -= float(np.log(unigram).sum())
        bigram_sum -= float(np.log(bigram).sum())
    return unigram_sum, bigram_sum


def _sample(train: Tokens, counted: int) -> list[np.ndarray]:
    if len(train) <= counted:
        return [train.window(0, len(train))]
    starts = np.linspace(0, len(train) - counted // _STRETCHES, _STRETCHES).astype(np.int64)
    return [train.window(int(start), counted // _STRETCHES) for start in starts]


def _compressed(text: Iterable[bytes], size: int) -> tuple[float, float]:
    """Bits per byte of `text` under gzip -9 and xz -9, with the headers of both."""
    gzip = zlib.compressobj(9, wbits=31)
    # As preset 9, with a dictionary no larger than the text: the same output for a tenth of the 674 MB of memory.
    dictionary = min(max(1 << (size - 1).bit_length(), 4096), 64 << 20)
    xz = lzma.LZMACompressor(filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}])
    gzip_bytes = xz_bytes = 0
    for block in text:
        gzip_bytes += len(gzip.compress(block))
        xz_bytes += len(xz.compress(block))
    return 8 * (gzip_bytes + len(gzip.flush())) / size, 8 * (xz_bytes + len(xz.flush())) / size
