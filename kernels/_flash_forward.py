"""Flash attention's forward kernel: the softmax of a row, never holding more of the row than one tile.

For scores s_j seen tile by tile, keep the running maximum m, the running total Σ exp(s_j - m) of the weights and
acc = Σ exp(s_j - m) v_j. When a tile raises the maximum from m to m', both sums are multiplied by exp(m - m'). At the
end the output is acc / total, and lse = m + log total is all that the backward pass needs to find any weight again:
p_j = exp(s_j - lse).
(Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention", Alg. 1;
Dao 2023, "FlashAttention-2", Alg. 1, whose order of loops this is: one program owns a block of queries.)

Exponentials are powers of 2, for which GPUs have an instruction: exp(s - m) = exp2(s · log2 e - m · log2 e), where
scale · log2 e is one factor, folded into the subtraction.
"""

from __future__ import annotations

from ._flash_tiles import Row, biased, capped, in_use, meeting, nth, spans, tile, visible
from ._launch import jit, tl


@jit
def _attend(
    acc, total, m, q, position, q_id, k_ptr, k_t, v_ptr, v_t, list_ptr, row, count, start, full_start, full_stop,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take `count` blocks of keys into the running sums: acc [M, D], total [M], m [M] (in powers of 2)."""
    for i in range(0, count):
        block = nth(i, start, full_start, full_stop, list_ptr, MASKED)
        s = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        k = tile(k_ptr, k_t, block * BLOCK_N, row.keys, D, BLOCK_N, BLOCK_D, MASKED, WIDEN)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        score, factor = biased(capped(score, row), position, s, row)
        if MASKED:
            kv_id = tl.load(row.kv_ids + s, s < row.keys, other=0) if row.kv_ids is not None else 0
            score = tl.where(visible(position, s, q_id, kv_id, row), score, float("-inf"))
        m_new = tl.maximum(m, tl.max(score, 1) * factor)
        # A row that has seen nothing yet is at -inf, and -inf - -inf would be NaN.
        origin = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        p = tl.exp2(score * factor - origin[:, None])
        shrink = tl.exp2(m - origin)
        total = total * shrink + tl.sum(p, 1)
        v = tile(v_ptr, v_t, block * BLOCK_N, row.keys, D, BLOCK_N, BLOCK_D, MASKED, WIDEN)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = m_new
    return acc, total, m


@jit
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,  # strides; the last axis is contiguous
    slopes_ptr, q_ids_ptr, kv_ids_ptr, q_lengths_ptr, kv_lengths_ptr, list_ptr, counts_ptr,  # None where absent
    scale, factor, softcap, left, right, H, G, T, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Writes out [B, T, H, D] and lse [B, H, T] (fp32, in powers of 2).

    lse is +inf for rows that see nothing, so that the weights exp(s - lse) found again from it are 0.
    """
    blocks = tl.cdiv(T, BLOCK_M)
    # Under a causal mask the last blocks see the most keys: started first, they do not finish last.
    block = blocks - 1 - tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b, h = tl.cast(bh // H, tl.int64), tl.cast(bh % H, tl.int64)
    g = h // (H // G)
    queries, keys = in_use(q_lengths_ptr, b, T), in_use(kv_lengths_ptr, b, S)
    row = Row(
        queries,
        keys,
        left,
        right,
        q_ids_ptr + b * T if q_ids_ptr is not None else None,
        kv_ids_ptr + b * S if kv_ids_ptr is not None else None,
        tl.load(slopes_ptr + h) * 1.4426950408889634 if slopes_ptr is not None else None,  # log2 e
        scale,
        softcap,
        factor,
    )

    t0 = block * BLOCK_M
    t = t0 + tl.arange(0, BLOCK_M)
    position = (t + (keys - queries))[:, None]
    q_id = tl.load(row.q_ids + t, t < queries, other=0)[:, None] if q_ids_ptr is not None else 0
    q = tile(q_ptr + b * q_b + h * q_h, q_t, t0, queries, D, BLOCK_M, BLOCK_D, True, WIDEN)
    k_ptr += b * k_b + g * k_h
    v_ptr += b * v_b + g * v_h

    start, full_start, full_stop, stop = spans(t0, queries, keys, left, right, BLOCK_M, BLOCK_N, False)
    at = b * blocks + block
    start, full_start, full_stop, stop = meeting(list_ptr, counts_ptr, at, start, full_start, full_stop, stop)
    if list_ptr is not None:
        list_ptr += at * tl.cdiv(S, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    full = full_stop - full_start
    edges = stop - start - full  # the causal diagonal, the window's ends, a ragged last block, the ends of documents
    acc, total, m = _attend(
        acc, total, m, q, position, q_id, k_ptr, k_t, v_ptr, v_t, list_ptr, row, full, start, full_start, full_stop,
        False, D, BLOCK_N, BLOCK_D, WIDEN, PRECISION,
    )  # fmt: skip
    acc, total, m = _attend(
        acc, total, m, q, position, q_id, k_ptr, k_t, v_ptr, v_t, list_ptr, row, edges, start, full_start, full_stop,
        True, D, BLOCK_N, BLOCK_D, WIDEN, PRECISION,
    )  # fmt: skip

    seen = (total != 0) & (t < queries)  # not `> 0`, which would hide a NaN
    total = tl.where(seen, total, 1.0)
    out = tl.where(seen[:, None], acc / total[:, None], 0.0)
    lse = tl.where(seen, m + tl.log2(total), float("inf"))
    tl.store(lse_ptr + (b * H + h) * T + t, lse, t < T)
    d = tl.arange(0, BLOCK_D)[None, :]
    out_at = ((b * T + t) * H + h)[:, None] * D + d
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), (t < T)[:, None] & (d < D))
