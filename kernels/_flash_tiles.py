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


class Row(NamedTuple):
    """What holds for all tiles of one batch row and one query head; None where an option is off.

    In a kernel None is known when it is compiled, so an option that is off costs nothing.
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
def spans(first, last, length, back, ahead, BLOCK: tl.constexpr):
    """The other side's blocks that own rows first..last meet, as block numbers (start, full_start, full_stop, stop).

    Own row p sees other rows p - back to p + ahead that lie in [0, length). In [full_start, full_stop) every own row
    sees the whole block. Bounds are clamped before they are divided: Triton's // rounds towards zero, Python's down.
    """
    start, stop, full_start, full_stop = 0, length, 0, length
    if back is not None:
        start = tl.maximum(first - back, 0) // BLOCK
        full_start = tl.cdiv(tl.maximum(last - back, 0), BLOCK)
    if ahead is not None:
        stop = tl.maximum(tl.minimum(last + ahead + 1, length), 0)
        full_stop = tl.maximum(tl.minimum(first + ahead + 1, length), 0)
    stop, full_stop = tl.cdiv(stop, BLOCK), full_stop // BLOCK
    full_start = tl.minimum(full_start, stop)
    return start, full_start, tl.maximum(full_stop, full_start), stop


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
def tanh(x):
    """Odd series near 0, where 1 - exp(-2|x|) would cancel; its next term is below 1e-8 at the seam."""
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2|x|), which cannot overflow
    far = (1 - e) / (1 + e)
    return tl.where(y < 0.0625, series, tl.where(x < 0, -far, far))


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
    last = tl.minimum(first + BLOCK, length) - 1
    shift = other_length - length  # own index -> position on the other side, whichever side is the keys'
    start, full_start, full_stop, stop = spans(first + shift, last + shift, other_length, back, ahead, OTHER)
    if OWN_KEYS:  # keys beyond the row's end are in the tile, and only a mask keeps them out of the sums
        full_stop = tl.where(first + BLOCK > length, full_start, full_stop)

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
