"""Which tokens make up which batch: sample n of a run, as a pure function of (seed, n).

A stream of N tokens is a ring, cut into S = ceil(N / stride) windows. Epoch e = n // S takes them all in an order of
its own, and cuts the ring at a place of its own, so that no two epochs see the same windows:

    start of sample n = (offset(seed, e) + stride · permutation(seed, e)[n mod S]) mod N

Nothing is kept between calls: a run resumes at any step, on any number of workers, with the samples it would have had.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from minillm.config import UserError
from minillm.data.batch import Batch
from minillm.data.tokens import TokenStream

_ROUNDS = 6  # four make a Feistel network a good cipher; two more for the few bits of a small corpus
VALIDATION = -1
"""The seed whose draws validation uses: the same masks whatever the run's seed."""


class Objective(Protocol):
    """What is to be predicted of a window: see corpus.py."""

    def sizes(self, context: int) -> tuple[int, int]:
        """(stride, length): tokens from one window to the next, tokens in one."""
        ...

    def batch(self, windows: np.ndarray, lengths: np.ndarray, samples: np.ndarray, *, seed: int) -> Batch:
        """Rows of a batch.

        Args:
            windows: [B, length] token ids.
            lengths: [B] how many of them are real; the rest is filling, as at the end of the validation text.
            samples: [B] the number of each, from which, with the seed, everything random about it follows.
        """
        ...


def mix(x: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit integers (splitmix64's finalizer, Steele et al. 2014): each bit in changes half the bits out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, epoch: np.ndarray) -> np.ndarray:
    """[B] one 64-bit key for each (seed, epoch)."""
    seeded = mix(np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return mix(seeded ^ mix(epoch.astype(np.uint64) + np.uint64(1)))


def order(position: np.ndarray, *, seed: int, epoch: np.ndarray, size: int) -> np.ndarray:
    """Where each position of an epoch stands in that epoch's permutation of 0 … size − 1; no table is made.

    A Feistel network permutes the integers of an even number of bits; what lands at `size` or above goes through it
    again, which stays a permutation (cycle walking: Black and Rogaway 2002).

    Args:
        position: [B] in 0 … size − 1.
        epoch: [B] the epoch of each.
    """
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = _keys(seed, np.broadcast_to(epoch, np.shape(position)))
    x = np.asarray(position).astype(np.uint64)
    walking = np.arange(len(x))
    while len(walking):
        left, right, key = x[walking] >> half, x[walking] & mask, keys[walking]
        for i in range(_ROUNDS):
            left, right = right, left ^ (mix(right + key + np.uint64(i << 56)) & mask)
        x[walking] = (left << half) | right
        walking = walking[x[walking] >= size]
    return x.astype(np.int64)


class Loader:
    """Training batches of one stream.

    Raises `UserError` where the stream is shorter than one window.
    """

    def __init__(self, stream: TokenStream, objective: Objective, *, context: int, seed: int):
        self.stream, self.objective, self.seed = stream, objective, seed
        self.stride, self.length = objective.sizes(context)
        if len(stream) < self.length:
            raise UserError(
                f"the training text has {len(stream)} tokens, fewer than one sample of {self.length} "
                f"(model.context is {context}); give more text, or choose a smaller --model.context"
            )
        self.samples_per_epoch = -(-len(stream) // self.stride)

    def batch(self, first: int, rows: int) -> Batch:
        """Samples first … first + rows − 1 of the run; the same ones whatever was asked for before."""
        samples = np.arange(first, first + rows)
        epoch, position = np.divmod(samples, self.samples_per_epoch)
        window = order(position, seed=self.seed, epoch=epoch, size=self.samples_per_epoch)
        offset = (_keys(~self.seed, epoch) >> np.uint64(1)).astype(np.int64) % len(self.stream)
        windows = self.stream.windows(offset + window * self.stride, self.length)
        return self.objective.batch(windows, np.full(rows, self.length), samples, seed=self.seed)


def validation(
    stream: TokenStream, objective: Objective, *, context: int, rows: int, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """The whole stream once, in consecutive windows that do not overlap, `rows` at a time.

    Every batch has the same shape: the last window, and the last batch, are filled up with tokens that count nowhere.
    Each window is the same whatever `rows` is, down to what a masked objective hides. Of several `ranks` each gets
    every so-manieth batch, the last ones perhaps one with nothing that counts, so that all get equally many.
    """
    stride, length = objective.sizes(context)
    overlap = min(length - stride, 1)
    starts = np.arange(0, max(1, len(stream) - overlap), stride)
    rows = min(rows, len(starts))
    for turn in range(0, len(starts), rows * ranks):
        first = turn + rank * rows
        chosen = starts[first : first + rows]
        lengths = np.zeros(rows, np.int64)
        lengths[: len(chosen)] = np.minimum(length, len(stream) - chosen)
        windows = stream.windows(np.resize(chosen if len(chosen) else starts, rows), length)
        yield objective.batch(windows, lengths, np.arange(first, first + rows), seed=VALIDATION)
