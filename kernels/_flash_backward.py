"""Flash attention's backward kernels: tiles of weights found again from lse, used at once, and forgotten.

With p = exp(s - lse) and δ = rowsum(do ∘ out), the derivation in flash_attention.py ends at, per tile,

    dv += pᵀ do      dp = do vᵀ      ds = p ∘ (dp - δ)      dk += scale · dsᵀ q      dq += scale · ds k

`by_keys`: one program owns a block of keys for one query head, walks over the queries that see it and keeps dk, dv in
registers; grouped heads are summed afterwards (walking over the group's heads in here would spill registers). With
`dq` it also adds its share to dq / scale, in fp32 and atomically: five products a tile, but a sum whose order, hence
last bit, differs from run to run.
`by_queries`: one program owns a block of queries and sums dq alone. Both together compute s and dp twice, seven
products a tile, and every sum has a fixed order: the deterministic backward.

Tiles are transposed, [keys, queries], in `by_keys`: p and ds are then left operands just as they lie in registers.
"""

from __future__ import annotations

from ._flash_tiles import Row, biased, capped, in_use, meeting, nth, spans, tile, visible
from ._launch import jit, tl


@jit
def row_delta(
    out_ptr, do_ptr, delta_ptr, out_b, out_h, out_t, do_b, do_h, do_t, H, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta [B, H, T] = Σ_d do · out, in fp32: the part of ds that is the same for a whole row."""
    blocks = tl.cdiv(T, BLOCK_M)
    t0, bh = tl.program_id(0) % blocks * BLOCK_M, tl.program_id(0) // blocks
    b, h = tl.cast(bh // H, tl.int64), tl.cast(bh % H, tl.int64)
    out = tile(out_ptr + b * out_b + h * out_h, out_t, t0, T, D, BLOCK_M, BLOCK_D, True, True)
    do = tile(do_ptr + b * do_b + h * do_h, do_t, t0, T, D, BLOCK_M, BLOCK_D, True, True)
    t = t0 + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + (b * H + h) * T + t, tl.sum(out * do, 1), t < T)


@jit
def _weights(product, lse, position, s, q_id, kv_id, row, MASKED: tl.constexpr):
    """p of a tile, either way round, and what dp - δ is multiplied by: p · d(score) / d(scaled product)."""
    score = capped(product, row)
    exponent, factor = biased(score, position, s, row)
    exponent *= factor
    if MASKED:  # before the power of 2, which a hidden score could make infinite
        exponent = tl.where(visible(position, s, q_id, kv_id, row), exponent, float("-inf"))
    p = tl.exp2(exponent - lse)
    slope = p
    if row.softcap is not None:  # d (c tanh(x / c)) / dx = 1 - tanh²
        ratio = score * (1.0 / row.softcap)
        slope = p * (1 - ratio * ratio)
    return p, slope


@jit
def _gather(
    dk, dv, k, v, s, kv_id, q_ptr, q_t, do_ptr, do_t, lse_ptr, delta_ptr, dq_ptr, dq_t, list_ptr, row,
    count, start, full_start, full_stop,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take `count` blocks of queries into dk, dv [N, D], and add this block of keys' share to dq."""
    for i in range(0, count):
        block = nth(i, start, full_start, full_stop, list_ptr, MASKED)
        t = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = t < row.queries
        position = (t + (row.keys - row.queries))[None, :]
        q_id = tl.load(row.q_ids + t, inside, other=0)[None, :] if row.q_ids is not None else 0
        q = tile(q_ptr, q_t, block * BLOCK_M, row.queries, D, BLOCK_M, BLOCK_D, MASKED, WIDEN)
        do = tile(do_ptr, do_t, block * BLOCK_M, row.queries, D, BLOCK_M, BLOCK_D, MASKED, WIDEN)
        # Each sum takes its tile before the next product starts: two at once would not fit into the registers.
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        # A row that is not there has no weights.
        lse = (tl.load(lse_ptr + t, inside, other=float("inf")) if MASKED else tl.load(lse_ptr + t))[None, :]
        p, slope = _weights(product, lse, position, s, q_id, kv_id, row, MASKED)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        delta = (tl.load(delta_ptr + t, inside, other=0.0) if MASKED else tl.load(delta_ptr + t))[None, :]
        ds = (slope * (dp - delta)).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if dq_ptr is not None:
            # Hopper's matrix unit takes 64 rows or more: of a low, wide tile those of the transpose. On the tiles of
            # other chips turning it would spill.
            if 4 * BLOCK_M <= k.shape[0]:
                share = tl.trans(tl.dot(tl.trans(k), ds, input_precision=PRECISION))
            else:
                share = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
            d = tl.arange(0, BLOCK_D)[None, :]
            at = dq_ptr + (tl.cast(block * BLOCK_M, tl.int64) + tl.arange(0, BLOCK_M)[:, None]) * dq_t + d
            if MASKED:
                tl.atomic_add(at, share, inside[:, None] & (d < D), sem="relaxed")
            else:
                tl.atomic_add(at, share, d < D, sem="relaxed")
    return dk, dv


@jit
def by_keys(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,  # dq: fp32 zeros, or None
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t,  # strides; the last axis is contiguous
    slopes_ptr, q_ids_ptr, kv_ids_ptr, q_lengths_ptr, kv_lengths_ptr, list_ptr, counts_ptr,  # None where absent
    scale, factor, softcap, left, right, H, G, T, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys and one query head. Writes dk, dv [B, S, H, D]; adds to dq [B, T, H, D],
    still without the factor `scale`, where it is given.
    """
    blocks = tl.cdiv(S, BLOCK_N)
    block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks  # causal: the first keys are seen most
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

    n0 = block * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    s = n[:, None]
    kv_id = tl.load(row.kv_ids + s, s < keys, other=0) if kv_ids_ptr is not None else 0
    k = tile(k_ptr + b * k_b + g * k_h, k_t, n0, keys, D, BLOCK_N, BLOCK_D, True, WIDEN)
    v = tile(v_ptr + b * v_b + g * v_h, v_t, n0, keys, D, BLOCK_N, BLOCK_D, True, WIDEN)
    q_ptr += b * q_b + h * q_h
    do_ptr += b * do_b + h * do_h
    lse_ptr += (b * H + h) * T
    delta_ptr += (b * H + h) * T
    if dq_ptr is not None:
        dq_ptr += (b * T * H + h) * D

    # Key s is seen by the positions s - right to s + left: the window's sides change places.
    start, full_start, full_stop, stop = spans(n0, keys, queries, right, left, BLOCK_N, BLOCK_M, True)
    at = b * blocks + block
    start, full_start, full_stop, stop = meeting(list_ptr, counts_ptr, at, start, full_start, full_stop, stop)
    if list_ptr is not None:
        list_ptr += at * tl.cdiv(T, BLOCK_M)
    full = full_stop - full_start
    edges = stop - start - full

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk, dv = _gather(
        dk, dv, k, v, s, kv_id, q_ptr, q_t, do_ptr, do_t, lse_ptr, delta_ptr, dq_ptr, H * D, list_ptr, row,
        full, start, full_start, full_stop, False, D, BLOCK_M, BLOCK_D, WIDEN, PRECISION,
    )  # fmt: skip
    dk, dv = _gather(
        dk, dv, k, v, s, kv_id, q_ptr, q_t, do_ptr, do_t, lse_ptr, delta_ptr, dq_ptr, H * D, list_ptr, row,
        edges, start, full_start, full_stop, True, D, BLOCK_M, BLOCK_D, WIDEN, PRECISION,
    )  # fmt: skip

    d = tl.arange(0, BLOCK_D)[None, :]
    kv_at = ((b * S + n) * H + h)[:, None] * D + d
    inside = (n < S)[:, None] & (d < D)
    tl.store(dk_ptr + kv_at, (dk * scale).to(dk_ptr.dtype.element_ty), inside)
    tl.store(dv_ptr + kv_at, dv.to(dv_ptr.dtype.element_ty), inside)


@jit
def _collect(
    dq, q, do, lse, delta, position, q_id, k_ptr, k_t, v_ptr, v_t, list_ptr, row, count, start, full_start, full_stop,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take `count` blocks of keys into dq [M, D]."""
    for i in range(0, count):
        block = nth(i, start, full_start, full_stop, list_ptr, MASKED)
        s = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        kv_id = tl.load(row.kv_ids + s, s < row.keys, other=0) if row.kv_ids is not None else 0
        k = tile(k_ptr, k_t, block * BLOCK_N, row.keys, D, BLOCK_N, BLOCK_D, MASKED, WIDEN)
        v = tile(v_ptr, v_t, block * BLOCK_N, row.keys, D, BLOCK_N, BLOCK_D, MASKED, WIDEN)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        _, slope = _weights(product, lse, position, s, q_id, kv_id, row, MASKED)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = slope * (dp - delta)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@jit
def by_queries(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t,  # strides; the last axis is contiguous
    slopes_ptr, q_ids_ptr, kv_ids_ptr, q_lengths_ptr, kv_lengths_ptr, list_ptr, counts_ptr,  # None where absent
    scale, factor, softcap, left, right, H, G, T, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Writes dq [B, T, H, D]; walks over keys just as the forward does."""
    blocks = tl.cdiv(T, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # heavy blocks first, as in the forward
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
    do = tile(do_ptr + b * do_b + h * do_h, do_t, t0, queries, D, BLOCK_M, BLOCK_D, True, WIDEN)
    lse = tl.load(lse_ptr + (b * H + h) * T + t, t < queries, other=float("inf"))[:, None]
    delta = tl.load(delta_ptr + (b * H + h) * T + t, t < queries, other=0.0)[:, None]
    k_ptr += b * k_b + g * k_h
    v_ptr += b * v_b + g * v_h

    start, full_start, full_stop, stop = spans(t0, queries, keys, left, right, BLOCK_M, BLOCK_N, False)
    at = b * blocks + block
    start, full_start, full_stop, stop = meeting(list_ptr, counts_ptr, at, start, full_start, full_stop, stop)
    if list_ptr is not None:
        list_ptr += at * tl.cdiv(S, BLOCK_N)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = full_stop - full_start
    edges = stop - start - full
    dq = _collect(
        dq, q, do, lse, delta, position, q_id, k_ptr, k_t, v_ptr, v_t, list_ptr, row,
        full, start, full_start, full_stop, False, D, BLOCK_N, BLOCK_D, WIDEN, PRECISION,
    )  # fmt: skip
    dq = _collect(
        dq, q, do, lse, delta, position, q_id, k_ptr, k_t, v_ptr, v_t, list_ptr, row,
        edges, start, full_start, full_stop, True, D, BLOCK_N, BLOCK_D, WIDEN, PRECISION,
    )  # fmt: skip

    d = tl.arange(0, BLOCK_D)[None, :]
    out_at = ((b * T + t) * H + h)[:, None] * D + d
    tl.store(dq_ptr + out_at, (dq * scale).to(dq_ptr.dtype.element_ty), (t < T)[:, None] & (d < D))
