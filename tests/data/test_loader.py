"""Which samples a run sees: all of the text, in an order that is a function of (seed, epoch, position) alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from minillm.config import UserError
from minillm.data.batch import IGNORED
from minillm.data.corpus import Masked, NextToken, SpanCorruption
from minillm.data.loader import Loader, order, validation
from minillm.data.tokens import TokenStream, TokenWriter, token_file

OBJECTIVES = {
    "next": NextToken(document_id=2, separate=True),
    "masked": Masked(document_id=2, mask_id=3, special=[0, 1, 2, 3], vocab_size=1200, rate=0.15, separate=True),
    "span": SpanCorruption(document_id=2, end_id=1, sentinel_ids=list(range(1100, 1132)), rate=0.15, span_length=3.0),
}


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """1,003 different ids, so that an id says where it stands."""
    writer = TokenWriter(tmp_path, "train", width=2, tokenizer="00" * 32, shard_tokens=10_000)
    writer.write(np.arange(10, 1013))
    writer.close()
    return TokenStream([(tmp_path / token_file("train", 0), writer.headers[0])])


def permutation(size: int, seed: int, epoch: int) -> list[int]:
    return order(np.arange(size), seed=seed, epoch=np.full(size, epoch), size=size).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1001, 4097, 65_537])
def test_order_is_a_permutation_of_its_own_for_each_seed_and_epoch(size: int) -> None:
    orders = {(seed, epoch): permutation(size, seed, epoch) for seed in (0, 1, -1, 2**63) for epoch in (0, 1)}
    assert all(sorted(found) == list(range(size)) for found in orders.values())
    if size >= 16:
        assert len({tuple(found) for found in orders.values()}) == len(orders)


def test_order_mixes_well() -> None:
    """Every (position, place) pair is as likely as another: chi-square over 2,000 epochs of 11."""
    counts = np.zeros((11, 11))
    for epoch in range(2000):
        counts[np.arange(11), permutation(11, 7, epoch)] += 1
    expected = 2000 / 11
    chi_square = float(((counts - expected) ** 2 / expected).sum())  # 100 degrees of freedom
    assert 60 < chi_square < 150
    neighbours = np.diff(permutation(10_000, 7, 0))
    assert (np.abs(neighbours) == 1).mean() < 0.002


def test_the_order_is_the_same_in_every_version(stream: TokenStream) -> None:
    """A run that another version began goes on with the samples that it would have had."""
    assert permutation(11, 7, 1) == [4, 8, 6, 2, 5, 1, 9, 7, 0, 3, 10]
    assert Loader(stream, OBJECTIVES["next"], context=32, seed=3).batch(30, 4).ids[:, 0].tolist() == [
        587,
        715,
        130,
        834,
    ]


def test_an_epoch_predicts_every_token(stream: TokenStream) -> None:
    """Once each; the last window's overhang wraps around to the beginning and is seen twice."""
    loader = Loader(stream, OBJECTIVES["next"], context=32, seed=3)
    assert loader.samples_per_epoch == 32  # 1003 / 32, rounded up
    epochs = []
    for epoch in range(2):
        batch = loader.batch(epoch * 32, 32)
        counts = np.bincount(batch.targets.ravel().numpy(), minlength=1013)[10:]
        assert counts.min() == 1 and counts.max() == 2 and (counts == 2).sum() == 32 * 32 - 1003
        epochs.append(batch.ids[:, 0].sort().values)
    assert not torch.equal(epochs[0], epochs[1])  # the second epoch cuts at other places


@pytest.mark.parametrize("name", OBJECTIVES)
def test_samples_do_not_depend_on_batches(stream: TokenStream, name: str) -> None:
    """Not on their size, not on which were asked for before, not across the end of an epoch."""
    loader = Loader(stream, OBJECTIVES[name], context=32, seed=3)
    whole = loader.batch(20, 24)
    again = Loader(stream, OBJECTIVES[name], context=32, seed=3)
    parts = [again.batch(first, rows) for first, rows in ((39, 5), (20, 1), (21, 18))]
    for field in ("ids", "targets", "segments", "source"):
        expected = getattr(whole, field)
        if expected is not None:
            assert torch.equal(torch.cat([getattr(parts[i], field) for i in (1, 2, 0)]), expected)
    assert whole.samples == tuple(range(20, 44)) == parts[1].samples + parts[2].samples + parts[0].samples
    other = Loader(stream, OBJECTIVES[name], context=32, seed=4).batch(20, 24)
    assert not torch.equal(other.targets, whole.targets)


def by_sample(batches) -> dict[int, tuple]:
    rows: dict[int, tuple] = {}
    for batch in batches:
        for i, sample in enumerate(batch.samples):
            if (batch.targets[i] != IGNORED).any():
                source = None if batch.source is None else batch.source[i].tolist()
                rows[sample] = (batch.ids[i].tolist(), batch.targets[i].tolist(), batch.segments[i].tolist(), source)
    return rows


@pytest.mark.parametrize("name", OBJECTIVES)
def test_validation_is_the_same_for_any_number_of_rows(stream: TokenStream, name: str) -> None:
    runs = [list(validation(stream, OBJECTIVES[name], context=32, rows=rows)) for rows in (1, 5, 32, 64)]
    expected = by_sample(runs[0])
    assert len(expected) == (29 if name == "span" else 32)  # spans leave room for longer windows
    for run in runs[1:]:
        assert by_sample(run) == expected
        assert len({batch.ids.shape for batch in run}) == 1


def test_validation_counts_every_target_once(stream: TokenStream) -> None:
    for context in (32, 167, 501, 1002, 1003, 5000):  # 1002 targets: whole windows, and not
        batches = list(validation(stream, OBJECTIVES["next"], context=context, rows=1))
        assert len(batches) == -(-1002 // context)
        targets = torch.cat([batch.targets.ravel() for batch in batches])
        assert targets[targets != IGNORED].tolist() == list(range(11, 1013))
    masked = list(validation(stream, OBJECTIVES["masked"], context=32, rows=3))
    real = torch.cat([batch.segments.ravel() for batch in masked]) >= 0
    assert int(real.sum()) == 1003


def test_a_text_shorter_than_a_sample_is_refused(stream: TokenStream) -> None:
    assert Loader(stream, OBJECTIVES["next"], context=1002, seed=0).batch(0, 2).ids.shape == (2, 1002)
    with pytest.raises(UserError, match=r"has 1003 tokens, fewer than one sample of 1004 \(model.context is 1003\)"):
        Loader(stream, OBJECTIVES["next"], context=1003, seed=0)
