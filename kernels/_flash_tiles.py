"""What flash attention's kernels share: which tiles meet, what a tile's scores are, and how tiles are loaded.

A tile is BLOCK_M queries by BLOCK_N keys. Three kinds of it: no query sees any key (never visited), every query sees
every key (visited without a mask: most of the work at long contexts), and the rest, which pays for the masks.
Positions are the keys' own indices: query t of a row with `queries` queries and `keys` keys stands at
t + keys - queries.

With causal masks, windows and lengths the tiles that meet lie side by side, and `spans` gives their bounds. Packed
documents may lie anywhere, so a small kernel first lists the tiles that meet: a query block and a key block can share
an id only where the intervals from their smallest to their largest id overlap (exact for sorted ids, cautious else).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._launch import jit, tl, triton
from ._softcap import tanh


class Row(NamedTuple):
    """What holds for all tiles of one batch row and one query head; None where an option is off.

    In a kernel None is known when it is compiled, so an option that is off costs nothing. Each kernel builds its own:
    what a function returns cannot hold None before Triton 3.7.
    """

    queries: Any  # in use; the rest of T is padding
    keys: Any  # in use; the rest of S is padding
    left: Any  # keys seen before the query's own position
    right: Any  # keys seen after it
    q_ids: Any  # -> [T] this row's segment ids
    kv_ids: Any  # -> [S]
    slope: Any  # ALiBi's, of this head, in powers of 2: times log2 e
    scale: Any
    softcap: Any
    factor: Any  # exp(score) is exp2(what `capped` returns · factor)


@jit
def in_use(lengths_ptr, b, size):
    """The row's true length, within its tensor whatever `lengths` says; `size` where there are none."""
    if lengths_ptr is not None:
        size = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), size).to(tl.int32)
    return size


@jit
def spans(first, length, other_length, back, ahead, BLOCK: tl.constexpr, OTHER: tl.constexpr, OWN_KEYS: tl.constexpr):
    """The other side's blocks that own rows first .. first + BLOCK meet, as (start, full_start, full_stop, stop).

    Of the own side `length` rows are in use, and row i sees the other side's rows p - back to p + ahead that lie in
    [0, other_length), where p = i + other_length - length. In [full_start, full_stop) every own row sees the whole
    block. Bounds are clamped before they are divided: Triton's // rounds towards zero, Python's down.
    """
    shift = other_length - length
    low, high = first + shift, tl.minimum(first + BLOCK, length) - 1 + shift  # positions of the first and the last row
    other_length = tl.where(first < length, other_length, 0)  # a block of padding visits nothing
    start, stop, full_start, full_stop = 0, other_length, 0, other_length
    if back is not None:
        start = tl.maximum(low - back, 0) // OTHER
        full_start = tl.cdiv(tl.maximum(high - back, 0), OTHER)
    if ahead is not None:
        stop = tl.maximum(tl.minimum(high + ahead + 1, other_length), 0)
        full_stop = tl.maximum(tl.minimum(low + ahead + 1, other_length), 0)
    stop, full_stop = tl.cdiv(stop, OTHER), full_stop // OTHER
    full_start = tl.minimum(full_start, stop)
    full_stop = tl.maximum(full_stop, full_start)
    if OWN_KEYS:  # keys beyond the row's end are in the tile, and only a mask keeps them out of the sums
        full_stop = tl.where(first + BLOCK > length, full_start, full_stop)
    return start, full_start, full_stop, stop


@jit
def tile(
    ptr, stride, start, length,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + BLOCK of a [length, D] matrix, zeros where it ends: [BLOCK, BLOCK_D]."""
    rows, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    # The block's first row in int64, since rows * stride overflows int32 from 2^31 elements on.
    at = ptr + tl.cast(start, tl.int64) * stride + rows * stride + d
    if BOUNDED:
        x = tl.load(at, (rows < length - start) & (d < D), other=0.0)
    elif D != BLOCK_D:
        x = tl.load(at, d < D, other=0.0)
    else:
        x = tl.load(at)
    if WIDEN:  # the interpreter's product of bf16 tiles is silently wrong
        x = x.to(tl.float32)
    return x


@jit
def capped(product, row):
    """Scores after scale and softcap; without a cap the bare product, which `factor` scales."""
    if row.softcap is not None:
        product = row.softcap * tanh(product * (row.scale / row.softcap))
    return product


@jit
def biased(score, position, s, row):
    """What `capped` returns, less ALiBi's bias, and the factor that makes it an argument of exp2.

    With ALiBi that factor is 1: far from all its keys a row's scores are so large that one more rounding would show.
    """
    factor = row.factor
    if row.slope is not None:
        score = score * row.factor - row.slope * tl.abs(position - s).to(tl.float32)
        factor = 1.0
    return score, factor


@jit
def visible(position, s, q_id, kv_id, row):
    """Which pairs may see each other; position, q_id and s, kv_id lie along the tile's two axes, either way round."""
    seen = s < row.keys
    if row.left is not None:
        seen = seen & (s >= position - row.left)
    if row.right is not None:
        seen = seen & (s <= position + row.right)
    if row.q_ids is not None:
        seen = seen & (q_id == kv_id)
    return seen


@jit
def _id_bounds(ids_ptr, lengths_ptr, low_ptr, high_ptr, length, blocks, BLOCK: tl.constexpr):
    """Smallest and largest id of each block of a row; low > high for a block of padding, which overlaps nothing."""
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < in_use(lengths_ptr, b, length)
    ids = tl.load(ids_ptr + tl.cast(b, tl.int64) * length + at, inside, other=0).to(tl.int64)
    tl.store(low_ptr + tl.program_id(0), tl.min(tl.where(inside, ids, 0x7FFFFFFFFFFFFFFF), 0))
    tl.store(high_ptr + tl.program_id(0), tl.max(tl.where(inside, ids, -0x7FFFFFFFFFFFFFFF), 0))


@jit
def _list_tiles(
    low_ptr, high_ptr, other_low_ptr, other_high_ptr, lengths_ptr, other_lengths_ptr, list_ptr, counts_ptr,
    back, ahead, length, other_length, blocks, other_blocks,
    OWN_KEYS: tl.constexpr, BLOCK: tl.constexpr, OTHER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The other side's blocks that each own block meets: those that need no mask, then the rest, each in order."""
    pid = tl.program_id(0)
    b, first = pid // blocks, pid % blocks * BLOCK
    length, other_length = in_use(lengths_ptr, b, length), in_use(other_lengths_ptr, b, other_length)
    start, full_start, full_stop, stop = spans(first, length, other_length, back, ahead, BLOCK, OTHER, OWN_KEYS)
    low, high = tl.load(low_ptr + pid), tl.load(high_ptr + pid)
    found = 0
    for kind in tl.static_range(2):
        for chunk in range(0, other_blocks, CHUNK):
            other = chunk + tl.arange(0, CHUNK)
            at, inside = b * other_blocks + other, other < other_blocks
            other_low = tl.load(other_low_ptr + at, inside, other=0)
            other_high = tl.load(other_high_ptr + at, inside, other=0)
            meets = inside & (other_low <= high) & (other_high >= low) & (other >= start) & (other < stop)
            same = (low == high) & (other_low == low) & (other_high == high)  # one document fills both
            full = same & (other >= full_start) & (other < full_stop)
            wanted = (meets & full if kind == 0 else meets & (full == 0)).to(tl.int32)
            slot = tl.cast(pid, tl.int64) * other_blocks + found + tl.cumsum(wanted, 0) - 1
            tl.store(list_ptr + slot, other, wanted != 0)
            found += tl.sum(wanted, 0)
        tl.store(counts_ptr + 2 * pid + kind, found)


@jit
def meeting(list_ptr, counts_ptr, at, start, full_start, full_stop, stop):
    """What to walk through, (start, full_start, full_stop, stop): block numbers, or places in the list if given one."""
    if list_ptr is not None:
        start, full_start = 0, 0
        full_stop, stop = tl.load(counts_ptr + 2 * at), tl.load(counts_ptr + 2 * at + 1)
    return start, full_start, full_stop, stop


@jit
def nth(i, start, full_start, full_stop, list_ptr, MASKED: tl.constexpr):
    """The i-th block that needs the mask (before full_start or from full_stop on), or the i-th that needs none.

    Both edges in one loop: with a loop for each, the backward kernel would not fit into its registers.
    """
    if MASKED:
        place = start + i
        place += tl.where(place >= full_start, full_stop - full_start, 0)
    else:
        place = full_start + i
    return tl.load(list_ptr + place) if list_ptr is not None else place


def list_tiles(
    segments: tuple[Tensor, Tensor],  # [B, T], [B, S] contiguous
    lengths: tuple[Tensor | None, Tensor | None],
    left: int | None,
    right: int | None,
    *,
    own_keys: bool,
    block: int,
    other: int,
) -> tuple[Tensor, Tensor]:
    """For each block of `block` queries (keys if `own_keys`) the blocks of `other` keys (queries) that it meets.

    Returns the lists [B, blocks, other_blocks] and counts [B, blocks, 2] (without a mask, all), both int32.
    """
    (own_ids, other_ids), (own_lengths, other_lengths) = segments, lengths
    back, ahead = left, right
    if own_keys:
        own_ids, other_ids, own_lengths, other_lengths = other_ids, own_ids, other_lengths, own_lengths
        back, ahead = right, left
    B = own_ids.shape[0]
    bounds, sizes = [], []
    for ids, used, size in ((own_ids, own_lengths, block), (other_ids, other_lengths, other)):
        length, blocks = ids.shape[1], triton.cdiv(ids.shape[1], size)
        low, high = ids.new_empty(2, B, blocks, dtype=torch.int64)
        if B * blocks:
            _id_bounds[(B * blocks,)](ids, used, low, high, length, blocks, BLOCK=size)
        bounds += [low, high]
        sizes.append((length, blocks))
    (length, blocks), (other_length, other_blocks) = sizes
    lists = own_ids.new_empty(B, blocks, other_blocks, dtype=torch.int32)
    counts = own_ids.new_zeros(B, blocks, 2, dtype=torch.int32)
    if B * blocks:
        _list_tiles[(B * blocks,)](
            *bounds, own_lengths, other_lengths, lists, counts, back, ahead, length, other_length, blocks, other_blocks,
            OWN_KEYS=own_keys, BLOCK=block, OTHER=other, CHUNK=min(128, triton.next_power_of_2(max(other_blocks, 1))),
        )  # fmt: skip
    return lists, counts
