"""What is learnt from plain text: the next token, hidden tokens, or hidden spans. One class each.

Each makes the rows of a `Batch` out of windows of the token stream (loader.py says which windows). Rows have the same
shape for the same context, so that nothing compiles twice; what fills them up has segment −1 and target IGNORED.

B rows, L tokens of a window, T of the model, S of an encoder-decoder's encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minillm.config import UserError
from minillm.data.batch import IGNORED, Batch


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """Each token predicts the one after it, the next document's `document_id` included: so a model learns to end.

    separate: documents that share a row do not see each other.
    """

    document_id: int
    separate: bool

    def sizes(self, context: int) -> tuple[int, int]:
        return context, context + 1

    def batch(self, windows: np.ndarray, lengths: np.ndarray, samples: np.ndarray, *, seed: int) -> Batch:
        """windows [B, T + 1] -> ids, targets [B, T]"""
        real = np.arange(windows.shape[1]) < lengths[:, None]
        ids, targets = windows[:, :-1], np.where(real[:, 1:], windows[:, 1:], IGNORED)
        segments = document_segments(ids, real[:, :-1], self.document_id) if self.separate else None
        return _batch(samples, ids=ids, targets=targets, segments=segments)


@dataclass(frozen=True, kw_only=True)
class Masked:
    """A share of the tokens is hidden, and predicted from both sides (BERT, Devlin et al. 2018).

    Of the tokens chosen, 80 % become `mask_id`, 10 % another token drawn from those that are not special, 10 % stay.

    rate             share of the tokens of a row that is chosen, special ones aside; at least one
    special          ids that are neither chosen nor drawn
    word_starts      [V] whether a token begins a word: words are chosen whole, until the share is reached. None: tokens
    separate         documents that share a row do not see each other
    """

    document_id: int
    mask_id: int | None
    special: Sequence[int]
    vocab_size: int
    rate: float
    separate: bool
    word_starts: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        ordinary = np.ones(self.vocab_size, bool)
        ordinary[list(self.special)] = False
        object.__setattr__(self, "_ordinary", ordinary)
        object.__setattr__(self, "_drawn", np.flatnonzero(ordinary))
        starts = np.ones(self.vocab_size, bool) if self.word_starts is None else np.array(self.word_starts, bool)
        object.__setattr__(self, "_starts", starts | ~ordinary)

    def sizes(self, context: int) -> tuple[int, int]:
        """Raises `UserError` where the tokenizer has nothing to hide tokens with."""
        if self.mask_id is None:
            raise UserError("the tokenizer has no mask token, by which an encoder learns plain text; take another")
        return context, context

    def batch(self, windows: np.ndarray, lengths: np.ndarray, samples: np.ndarray, *, seed: int) -> Batch:
        """windows [B, T] -> ids, targets [B, T]"""
        real = np.arange(windows.shape[1]) < lengths[:, None]
        ids, targets = windows.copy(), np.full_like(windows, IGNORED)
        for row, sample in enumerate(samples):
            generator = _generator(seed, sample)
            chosen = self._choose(windows[row], real[row], generator)
            targets[row, chosen] = windows[row, chosen]
            fate = generator.random(len(chosen))
            ids[row, chosen[fate < 0.8]] = self.mask_id
            swapped = chosen[(fate >= 0.8) & (fate < 0.9)]
            ids[row, swapped] = generator.choice(self._drawn, len(swapped))
        segments = document_segments(windows, real, self.document_id) if self.separate else np.where(real, 0, -1)
        return _batch(samples, ids=ids, targets=targets, segments=segments)

    def _choose(self, window: np.ndarray, real: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Indices of the tokens that are hidden: words in random order, until their tokens reach the share."""
        candidates = np.flatnonzero(real & self._ordinary[window])
        word = np.cumsum(self._starts[window])[candidates]
        words, sizes = np.unique(word, return_counts=True)
        shuffled = generator.permutation(len(words))
        wanted = max(1, round(self.rate * len(candidates)))
        before = np.cumsum(sizes[shuffled]) - sizes[shuffled]
        return candidates[np.isin(word, words[shuffled[before < wanted]])]


@dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """Spans of a text are cut out and written by the decoder (T5, Raffel et al. 2020, figure 2).

        window   a b c d e f g         source  a b <0> e f <1>         targets  <0> c d <1> g end

    The decoder reads its targets shifted by one, behind `document_id`. A window is as long as the source that it leaves
    fits the context, so that no token is discarded. A whole window is one text: documents in it are not kept apart,
    since a span may cross from one into the next.

    end_id           closes the targets; text never contains it
    sentinel_ids     stand for the spans, in order
    rate             share of the tokens that is cut out
    span_length      mean length of a span
    """

    document_id: int
    end_id: int
    sentinel_ids: Sequence[int]
    rate: float
    span_length: float

    def counts(self, length: int) -> tuple[int, int]:
        """(tokens cut out, spans) of a window of `length` tokens; both sides keep at least a token for each span."""
        cut = min(max(round(length * self.rate), 1), length - 1)
        return cut, min(max(round(cut / self.span_length), 1), cut, length - cut)

    def sizes(self, context: int) -> tuple[int, int]:
        """The longest window whose source and targets both fit. Raises `UserError` for none, or spans without names."""
        if not self.sentinel_ids:
            raise UserError(
                "the tokenizer has no sentinels (<extra_id_0>, …), by which an encoder-decoder learns plain text; "
                "give it pairs (seq2seq), or take another model"
            )
        length = max((n for n in range(2, 2 * context + 2) if self._fits(n, context)), default=0)
        if length == 0:
            raise UserError(f"model.context ({context}) is too short for spans; choose a larger one")
        spans = self.counts(length)[1]
        if spans > len(self.sentinel_ids):
            raise UserError(
                f"{spans} spans in a context of {context} need as many sentinels; the tokenizer has "
                f"{len(self.sentinel_ids)}: raise data.span_length, or lower data.mask_rate or model.context"
            )
        return length, length

    def _fits(self, length: int, context: int) -> bool:
        cut, spans = self.counts(length)
        return length - cut + spans <= context and cut + spans + 1 <= context

    def batch(self, windows: np.ndarray, lengths: np.ndarray, samples: np.ndarray, *, seed: int) -> Batch:
        """windows [B, L] -> source [B, S], ids and targets [B, T]"""
        B, L = windows.shape
        cut, spans = self.counts(L)
        S, T = L - cut + spans, cut + spans + 1
        source, targets = np.full((B, S), self.end_id), np.full((B, T), IGNORED)
        source_real, target_real = np.zeros((B, S), bool), np.zeros((B, T), bool)
        for row, (length, sample) in enumerate(zip(lengths, samples, strict=True)):
            if length < 2:  # nothing would be left on one of the sides
                continue
            kept, written = self._corrupt(windows[row, :length], _generator(seed, sample))
            source[row, : len(kept)], source_real[row, : len(kept)] = kept, True
            targets[row, : len(written)], target_real[row, : len(written)] = written, True
        ids = np.full((B, T), self.document_id)
        ids[:, 1:] = np.where(target_real[:, :-1], targets[:, :-1], self.end_id)
        return _batch(
            samples,
            ids=ids,
            targets=targets,
            segments=np.where(target_real, 0, -1),
            source=source,
            source_segments=np.where(source_real, 0, -1),
        )

    def _corrupt(self, window: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(source, targets) of one text: stretches that stay and spans that go alternate, the first one stays."""
        cut, spans = self.counts(len(window))
        stay = _random_parts(len(window) - cut, spans, generator)
        go = _random_parts(cut, spans, generator)
        ends = np.cumsum(np.stack([stay, go], 1).ravel())
        stretches = np.split(window, ends[:-1])
        source, targets = [], []
        for i, sentinel in enumerate(self.sentinel_ids[:spans]):
            source += [stretches[2 * i], [sentinel]]
            targets += [[sentinel], stretches[2 * i + 1]]
        return np.concatenate(source), np.concatenate([*targets, [self.end_id]])


def document_segments(ids: np.ndarray, real: np.ndarray, document_id: int) -> np.ndarray:
    """[B, T] number of each token's document in its row, −1 where it is not real."""
    return np.where(real, np.cumsum(ids == document_id, 1), -1)


def _random_parts(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """[parts] positive lengths that add up to `total`, every such division equally likely."""
    cuts = np.sort(generator.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def _generator(seed: int, sample: int) -> np.random.Generator:
    """All that is random about one sample: Philox, a cipher of (seed, sample) (Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=seed % 2**64, counter=[0, 0, 0, int(sample)]))


def _batch(samples: np.ndarray, **arrays: np.ndarray | None) -> Batch:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items() if x is not None}
    return Batch(samples=tuple(samples.tolist()), **tensors)
