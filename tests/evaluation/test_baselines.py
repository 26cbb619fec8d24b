"""Baselines against the same formulas written out token by token."""

import gzip
import lzma
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from minillm.evaluation.baselines import Ngrams, baselines

V = 23


class Ring:
    def __init__(self, ids: np.ndarray):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def window(self, start: int, length: int) -> np.ndarray:
        return np.take(self.ids, np.arange(start, start + length), mode="wrap")


def chain(seed: int, length: int) -> np.ndarray:
    """A text in which each token says much about the next; 21 and 22 do not occur."""
    generator = np.random.default_rng(seed)
    ids = [0]
    for step, jump in zip(generator.random(length), generator.integers(0, 21, length), strict=True):
        ids.append((3 * ids[-1] + 1) % 21 if step < 0.6 else int(jump**2 // 20))
    return np.array(ids)


def naive(train: np.ndarray, val: np.ndarray) -> tuple[float, float]:
    """(unigram, bigram) loss; the weights by a search over a grid instead of EM."""
    ones, pairs, firsts = Counter(train.tolist()), Counter(pairwise(train.tolist())), Counter(train[:-1].tolist())
    N = len(train)

    def deleted(group: int, w: float) -> float:
        total = 0.0
        for (a, b), count in pairs.items():
            if firsts[a].bit_length() == group:
                r = (count - 1) / max(firsts[a] - 1, 1)
                total += count * math.log(w * r + (1 - w) * ones[b] / (N - 1 + V))
        return total

    groups = {n.bit_length() for n in firsts.values()}
    weights = {g: max(np.arange(0, 1, 0.0025), key=lambda w, g=g: deleted(g, w)) for g in groups}
    unigram = bigram = 0.0
    for a, b in pairwise(val.tolist()):
        p = (ones[b] + 1) / (N + V)
        w = weights[firsts[a].bit_length()] if firsts[a] else 0.0
        unigram -= math.log(p)
        bigram -= math.log(w * pairs[a, b] / max(firsts[a], 1) + (1 - w) * p)
    return unigram / (len(val) - 1), bigram / (len(val) - 1)


def test_against_the_formulas_written_out() -> None:
    train, val = chain(1, 700), np.append(chain(2, 300), [22, 5, 21])  # unseen contexts and targets too
    text = b"some text " * 400
    found = baselines(Ring(train), Ring(val), vocab_size=V, val_bytes=len(text), val_text=[text[:1001], text[1001:]])
    unigram, bigram = naive(train, val)
    assert found["uniform_loss"] == math.log(V) and found["val_targets"] == len(val) - 1
    assert found["unigram_loss"] == pytest.approx(unigram, rel=1e-12)
    assert found["bigram_loss"] == pytest.approx(bigram, rel=1e-4)  # as fine as the grid
    assert found["bigram_loss"] < found["unigram_loss"] < found["uniform_loss"]
    for name in ("uniform", "unigram", "bigram"):
        bits = found[f"{name}_loss"] * (len(val) - 1) / math.log(2) / len(text)
        assert found[name] == pytest.approx(bits, rel=1e-12)
    assert found["gzip"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert found["xz"] == 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert found["event"] == "baselines" and found["val_bytes"] == len(text)


def test_probabilities_add_up_to_one() -> None:
    ngrams = Ngrams([chain(1, 500)], V)
    for first in range(V):
        ids = np.stack([np.full(V, first), np.arange(V)], 1).ravel()
        unigram, bigram = (p[::2] for p in ngrams.probabilities(ids))
        assert unigram.sum() == pytest.approx(1) and bigram.sum() == pytest.approx(1) and bigram.min() > 0


def test_a_long_text_is_sampled_evenly() -> None:
    train, val = np.concatenate([chain(1, 30_000), (chain(1, 30_000) + 7) % 21]), chain(2, 2000)
    common = {"vocab_size": V, "val_bytes": 100, "val_text": [b"x" * 100]}
    whole = baselines(Ring(train), Ring(val), **common)
    part = baselines(Ring(train), Ring(val), counted=20_000, **common)
    assert whole["bigram_loss"] != part["bigram_loss"]
    assert part["bigram_loss"] == pytest.approx(whole["bigram_loss"], rel=0.02)
    first_third = baselines(Ring(train[:20_000]), Ring(val), **common)
    assert first_third["bigram_loss"] < 0.9 * part["bigram_loss"]  # what taking the beginning would have given


def test_text_beyond_the_limit_is_not_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.evaluation.baselines.COMPRESSED", 99)
    ids = Ring(chain(1, 50))
    found = baselines(ids, ids, vocab_size=V, val_bytes=100, val_text=[b"x" * 100])
    assert found["gzip"] is None and found["xz"] is None and found["bigram"] > 0


def test_a_pair_that_training_never_shows_costs_a_finite_number() -> None:
    train, val = np.tile([0, 1], 500), np.array([0, 1, 0, 0, 1])  # 0 0 never occurs, and pairs explain all of training
    found = baselines(Ring(train), Ring(val), vocab_size=2, val_bytes=4, val_text=[b"abaa"])
    assert 1.0 < found["bigram_loss"] < 3.0
