"""Objectives: what is hidden, what is predicted, what is kept apart."""

import numpy as np
import pytest
import torch

from minillm.config import UserError
from minillm.data.batch import IGNORED
from minillm.data.corpus import Masked, NextToken, SpanCorruption

SPECIAL, MASK, DOCUMENT, END, VOCAB = [0, 1, 2, 3], 3, 2, 1, 500


def masked(**options) -> Masked:
    common = {"document_id": DOCUMENT, "mask_id": MASK, "special": SPECIAL, "vocab_size": VOCAB, "rate": 0.15}
    return Masked(**{**common, "separate": True, **options})


def spans(**options) -> SpanCorruption:
    common = {"document_id": DOCUMENT, "end_id": END, "sentinel_ids": list(range(400, 464))}
    return SpanCorruption(**{**common, "rate": 0.15, "span_length": 3.0, **options})


def windows(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Random text with a document start in about every twentieth place."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(4, 400, (rows, length))
    ids[generator.random((rows, length)) < 0.05] = DOCUMENT
    return ids


def full(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.full(len(ids), ids.shape[1]), np.arange(len(ids))


def test_next_token_predicts_the_end_of_a_document_and_keeps_documents_apart() -> None:
    window = np.array([[7, 8, DOCUMENT, 9, DOCUMENT, 5, 6]])
    batch = NextToken(document_id=DOCUMENT, separate=True).batch(window, np.array([5]), np.array([4]), seed=0)
    assert batch.ids.tolist() == [[7, 8, DOCUMENT, 9, DOCUMENT, 5]] and batch.samples == (4,)
    assert batch.targets.tolist() == [[8, DOCUMENT, 9, DOCUMENT, IGNORED, IGNORED]]  # 5 of the 7 are real
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, -1]]
    joined = NextToken(document_id=DOCUMENT, separate=False).batch(window, np.array([7]), np.array([4]), seed=0)
    assert joined.segments is None and joined.targets.tolist() == window[:, 1:].tolist()


def test_masks_are_80_10_10_of_the_share() -> None:
    ids = windows(200, 256)
    batch = masked().batch(ids, *full(ids), seed=5)
    chosen = batch.targets != IGNORED
    text, seen = torch.from_numpy(ids), batch.ids
    assert torch.equal(batch.targets[chosen], text[chosen]) and torch.equal(seen[~chosen], text[~chosen])
    assert not np.isin(text[chosen], SPECIAL).any()
    ordinary = ~np.isin(ids, SPECIAL)
    np.testing.assert_array_equal(chosen.sum(1), np.round(0.15 * ordinary.sum(1)))
    n = int(chosen.sum())
    hidden = int((seen[chosen] == MASK).sum())
    kept = int((seen[chosen] == text[chosen]).sum())
    swapped = seen[chosen & (seen != MASK) & (seen != text)]
    for count, share in ((hidden, 0.8), (kept, 0.1), (len(swapped), 0.1)):
        assert abs(count - share * n) < 4 * (n * share * (1 - share)) ** 0.5
    assert not np.isin(swapped, SPECIAL).any() and swapped.max() > VOCAB - 20
    assert torch.equal(batch.segments, torch.from_numpy(np.cumsum(ids == DOCUMENT, 1)))
    assert not masked(separate=False).batch(ids, *full(ids), seed=5).segments.any()


def test_masks_follow_from_seed_and_sample() -> None:
    ids = np.repeat(windows(1, 64), 3, 0)
    lengths = np.full(3, 64)
    one = masked().batch(ids, lengths, np.array([1, 2, 1]), seed=0).targets
    assert torch.equal(one[0], one[2]) and not torch.equal(one[0], one[1])
    assert not torch.equal(one, masked().batch(ids, lengths, np.array([1, 2, 1]), seed=1).targets)


def test_at_least_one_mask_where_there_is_anything_to_hide() -> None:
    ids = np.array([[DOCUMENT, 9, DOCUMENT, 1], [DOCUMENT, 1, 1, 1], [8, 9, 10, 11]])
    batch = masked(rate=0.01).batch(ids, np.array([4, 4, 2]), np.arange(3), seed=0)
    assert batch.targets[0].tolist() == [IGNORED, 9, IGNORED, IGNORED]
    assert (batch.targets != IGNORED).sum(1).tolist() == [1, 0, 1]
    assert (batch.targets[2, 2:] == IGNORED).all() and batch.segments[2].tolist() == [0, 0, -1, -1]


def test_whole_words_are_hidden_together() -> None:
    starts = [i % 3 == 0 for i in range(VOCAB)]
    ids = windows(50, 128)
    chosen = (masked(word_starts=starts).batch(ids, *full(ids), seed=2).targets != IGNORED).numpy()
    for row, hidden in zip(ids, chosen, strict=True):
        word = np.cumsum([starts[i] or i in SPECIAL for i in row])
        ordinary = ~np.isin(row, SPECIAL)
        for w in np.unique(word):
            assert len(set(hidden[(word == w) & ordinary])) <= 1
        wanted, longest = round(0.15 * ordinary.sum()), np.bincount(word).max()
        assert wanted <= hidden.sum() < wanted + longest
    apart = masked(word_starts=starts, rate=0.3).batch(np.array([[300, DOCUMENT, 301]]), *full(ids[:1, :3]), seed=0)
    assert apart.counted == 1  # no word goes on behind a special token


def rebuilt(batch, row: int) -> list[int]:
    """The window, from what the encoder reads and the decoder should write."""
    targets = [t for t in batch.targets[row].tolist() if t != IGNORED]
    assert targets.pop() == END
    pieces: dict[int, list[int]] = {}
    for t in targets:
        if t >= 400:
            pieces[t] = []
        else:
            pieces[list(pieces)[-1]].append(t)
    assert list(pieces) == list(range(400, 400 + len(pieces))) and all(pieces.values())
    real = batch.source[row][batch.source_segments[row] >= 0].tolist()
    return [i for s in real for i in (pieces.pop(s) if s >= 400 else [s])]


@pytest.mark.parametrize("context", [4, 17, 64, 512])
@pytest.mark.parametrize(("rate", "span_length"), [(0.15, 3.0), (0.5, 1.5), (0.05, 10.0)])
def test_spans_put_back_give_the_window(context: int, rate: float, span_length: float) -> None:
    objective = spans(rate=rate, span_length=span_length, sentinel_ids=list(range(400, 700)))
    stride, length = objective.sizes(context)
    ids = windows(4, length)
    lengths = np.array([length, length, max(2, length // 2), 1])
    batch = objective.batch(ids, lengths, np.arange(4), seed=1)
    assert stride == length and batch.source.shape[1] <= context and batch.ids.shape[1] <= context
    for row in range(3):
        assert rebuilt(batch, row) == ids[row, : lengths[row]].tolist()
        count = int((batch.targets[row] != IGNORED).sum())
        assert batch.ids[row, :count].tolist() == [DOCUMENT, *batch.targets[row, : count - 1].tolist()]
        assert (batch.segments[row] >= 0).sum() == count
    assert batch.counted == sum(int((batch.targets[row] != IGNORED).sum()) for row in range(3))  # one token: nothing


def test_spans_have_the_share_and_the_mean_length_and_fill_the_context() -> None:
    objective = spans()
    assert objective.sizes(512) == (569, 569)  # 512 = 569 − 85 + 28, as in T5's recipe but for its end token
    assert objective.counts(569) == (85, 28)
    assert [objective.counts(length) for length in (2, 3, 20)] == [(1, 1), (1, 1), (3, 1)]
    ids = windows(300, 569)
    batch = objective.batch(ids, *full(ids), seed=0)
    places = np.stack([np.isin(batch.source[i].numpy(), range(400, 464)) for i in range(300)])
    first = places.argmax(1)
    assert first.std() > 5 and places.sum() == 300 * 28  # spans lie at different places in each row


def test_nothing_to_hide_tokens_with() -> None:
    assert masked().sizes(16) == (16, 16)
    with pytest.raises(UserError, match="the tokenizer has no mask token"):
        masked(mask_id=None).sizes(16)


def test_too_few_sentinels_or_too_short_a_context() -> None:
    with pytest.raises(UserError, match="28 spans in a context of 512 need as many sentinels; the tokenizer has 10"):
        spans(sentinel_ids=list(range(10))).sizes(512)
    with pytest.raises(UserError, match=r"model.context \(1\) is too short"):
        spans().sizes(1)
    with pytest.raises(UserError, match=r"the tokenizer has no sentinels .*; give it pairs \(seq2seq\)"):
        spans(sentinel_ids=[]).sizes(512)
