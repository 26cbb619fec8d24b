"""Which tiles flash attention visits, and which of them without a mask: neither fewer nor more than it must.

One tile too many changes no result, so that only these numbers show it.
"""

import random

import pytest
import torch
from torch import Tensor

from kernels._flash_tiles import list_tiles, spans
from kernels._launch import jit, tl


@jit
def _store_spans(
    out_ptr, first, length, other_length, back, ahead,
    BLOCK: tl.constexpr, OTHER: tl.constexpr, OWN_KEYS: tl.constexpr,
):  # fmt: skip
    start, full_start, full_stop, stop = spans(first, length, other_length, back, ahead, BLOCK, OTHER, OWN_KEYS)
    tl.store(out_ptr, start)
    tl.store(out_ptr + 1, full_start)
    tl.store(out_ptr + 2, full_stop)
    tl.store(out_ptr + 3, stop)


def seen(length: int, other_length: int, back: int | None, ahead: int | None) -> Tensor:
    """[length, other_length]: which own row sees which row of the other side."""
    position, s = torch.arange(length)[:, None] + other_length - length, torch.arange(other_length)
    low = position - (length + other_length if back is None else back)
    return (s >= low) & (s <= position + (length + other_length if ahead is None else ahead))


def blocks_of(visible: Tensor, first: int, block: int, other: int, own_keys: bool) -> tuple[list[int], list[int]]:
    """By looking at every pair: the blocks without a mask, and those with one, that rows first … first + block meet."""
    rows, fewer = visible[first : first + block], first + block > len(visible)
    full, edges = [], []
    for j in range(-(-visible.shape[1] // other)):
        pairs = rows[:, j * other : (j + 1) * other]
        if pairs.any():
            whole = pairs.all() and pairs.shape[1] == other and not (own_keys and fewer)
            (full if whole else edges).append(j)
    return full, edges


@pytest.mark.parametrize("seed", range(4))
def test_spans_are_exactly_the_blocks_that_meet(seed: int) -> None:
    rng, kinds = random.Random(seed), set()
    for _ in range(60):
        length, other_length = rng.randint(0, 40), rng.randint(0, 40)
        back, ahead = (rng.choice([None, 0, rng.randint(0, 30)]) for _ in range(2))
        block, other, own_keys = rng.choice([4, 8]), rng.choice([4, 8]), rng.random() < 0.5
        first = rng.randrange(0, length + block, block)  # now and then a block of padding
        found = torch.zeros(4, dtype=torch.int32)
        _store_spans[(1,)](found, first, length, other_length, back, ahead, BLOCK=block, OTHER=other, OWN_KEYS=own_keys)
        start, full_start, full_stop, stop = found.tolist()
        full, edges = blocks_of(seen(length, other_length, back, ahead), first, block, other, own_keys)
        case = f"{first=} {length=} {other_length=} {back=} {ahead=} {block=} {other=} {own_keys=}"
        assert list(range(full_start, full_stop)) == full, case
        assert [*range(start, full_start), *range(full_stop, stop)] == edges, case
        kinds.add((bool(full), bool(edges)))
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}


@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize(("block", "other"), [(8, 4), (4, 8), (16, 1)])  # blocks of 1: more of them than a chunk lists
def test_lists_hold_exactly_the_tiles_that_documents_share(block: int, other: int, own_keys: bool) -> None:
    torch.manual_seed(0)
    ids = tuple(torch.randint(0, 4, (2, n)).sort().values for n in (40, 130))
    lengths = torch.tensor([40, 21]), torch.tensor([130, 75])
    lists, counts = list_tiles(ids, lengths, None, None, own_keys=own_keys, block=block, other=other)
    for b in range(2):
        queries, keys = int(lengths[0][b]), int(lengths[1][b])
        visible = ids[0][b, :queries, None] == ids[1][b, :keys]
        visible = visible.t() if own_keys else visible
        for i in range(lists.shape[1]):
            full, edges = blocks_of(visible, i * block, block, other, own_keys)
            without_mask, all_of_them = counts[b, i].tolist()
            assert lists[b, i, :without_mask].tolist() == full, (b, i)
            assert lists[b, i, without_mask:all_of_them].tolist() == edges, (b, i)
    assert counts[..., 0].any() and (counts[..., 0] < counts[..., 1]).any()
