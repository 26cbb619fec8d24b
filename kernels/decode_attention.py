"""Attention of a few new queries against a long key/value cache: what each step of generation does.

One query per row gives a grid of B·G programs, far too few to fill a GPU, and no arithmetic to speak of: the time is
that of reading the cache, 2·B·G·S·D numbers. So (split-KV, "Flash-Decoding"; Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html)

1. the keys in use are cut into splits. A program takes one split of one key/value head and, with the online softmax,
   leaves o_i = Σ_s p_s v_s / Σ_s p_s and lse_i = log Σ_s exp(score_s) over its own keys;
2. a second kernel joins them. The softmax over all keys is the mean of the splits' softmaxes weighted by their share
   of the total:   o = Σ_i exp(lse_i − lse) · o_i,   lse = log Σ_i exp(lse_i).

The H / G query heads that share a key/value head, and their T queries, are the rows of one matrix product, so that the
cache is read once for all of them.

B batch, T queries, S keys in the cache's buffers, H query heads, G key/value heads, R = H / G, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.library import custom_op

from ._flash_launch import WIDEST, Window, check, head_constants, rows
from ._flash_tiles import in_use, tile
from ._launch import (
    POINTERS,
    AotCase,
    architecture,
    common_integers,
    jit,
    multiprocessors,
    runs_triton,
    shipped,
    tl,
    triton,
    tuned,
)
from ._softcap import tanh
from .flash_attention import flash_attention_reference

MOST_SPLITS = 128


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The definition, with the whole score matrix in memory: at least fp32 inside, q.dtype outside."""
    _check(q, k_cache, v_cache, lengths, window, softcap, alibi_slopes)
    S = k_cache.shape[2]
    used = (torch.arange(S, device=q.device) < lengths.long()[:, None])[:, None, :, None]  # [B, 1, S, 1]
    return flash_attention_reference(
        q,
        torch.where(used, k_cache, 0),  # a buffer's unused part may hold anything, NaN included
        torch.where(used, v_cache, 0),
        causal=True,
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        lengths=(torch.full_like(lengths, q.shape[2]), lengths),
    )


@jit
def _split(
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr,  # part [B, H, T, splits, D], lse [B, H, T, splits], both fp32
    lengths_ptr, slopes_ptr, q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s,  # strides; the last axis is contiguous
    scale, softcap, left, G, R, T, S, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one split of the keys of one key/value head, against BLOCK_M of the R·T rows that read it."""
    LOG2E: tl.constexpr = 1.4426950408889634  # GPUs have an instruction for powers of 2
    tiles = tl.cdiv(R * T, BLOCK_M)
    split = tl.program_id(0) % splits
    own = (tl.program_id(0) // splits) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    bg = tl.program_id(0) // (splits * tiles)
    b, g = tl.cast(bg // G, tl.int64), tl.cast(bg % G, tl.int64)  # offsets pass 2^31 in long caches
    h, t, exists = g * R + own // T, own % T, own < R * T
    d = tl.arange(0, BLOCK_D)

    length = in_use(lengths_ptr, b, S)
    position = length - T + t
    begin = length * 0
    if left is not None:
        begin = tl.maximum(length - T - left, 0)
    share = tl.cdiv(tl.cdiv(length - begin, splits), BLOCK_N) * BLOCK_N
    start = begin + split * share
    stop = tl.minimum(start + share, length)

    at = q_ptr + b * q_b + (h * q_h + t * q_t)[:, None] + d[None, :]
    q = tl.load(at, exists[:, None] & (d[None, :] < D), other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    k_ptr += b * k_b + g * k_g
    v_ptr += b * v_b + g * v_g
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for block in range(start, stop, BLOCK_N):
        s = block + tl.arange(0, BLOCK_N)
        k = tile(k_ptr, k_s, block, stop, D, BLOCK_N, BLOCK_D, True, WIDEN)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if softcap is not None:
            score = softcap * tanh(score / softcap)
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + h, exists, other=0.0)
            score -= slope[:, None] * tl.abs(position[:, None] - s[None, :]).to(tl.float32)
        visible = (s[None, :] < stop) & (s[None, :] <= position[:, None])
        if left is not None:
            visible = visible & (s[None, :] >= position[:, None] - left)
        score = tl.where(visible, score * LOG2E, float("-inf"))
        m_new = tl.maximum(m, tl.max(score, 1))
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: -inf - -inf would be NaN
        p = tl.exp2(score - origin[:, None])
        shrink = tl.exp2(m - origin)
        total = total * shrink + tl.sum(p, 1)
        v = tile(v_ptr, v_s, block, stop, D, BLOCK_N, BLOCK_D, True, WIDEN)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = m_new

    seen = total != 0  # not `> 0`, which would hide a NaN
    total = tl.where(seen, total, 1.0)
    to = ((b * G * R + h) * T + t) * splits + split
    tl.store(lse_ptr + to, tl.where(seen, m + tl.log2(total), float("-inf")), exists)  # in powers of 2
    tl.store(part_ptr + to[:, None] * D + d[None, :], acc / total[:, None], exists[:, None] & (d[None, :] < D))


@jit
def _combine(
    part_ptr, lse_ptr, out_ptr, lengths_ptr, per_batch, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: one row of out [B, H, T, D] from its splits, GROUP of them at a time."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    lse = tl.load(lse_ptr + row * SPLITS + tl.arange(0, SPLITS))
    m = tl.max(lse, 0)
    m = tl.where(m == float("-inf"), 0.0, m)  # a row that sees nothing
    total = tl.sum(tl.exp2(lse - m), 0)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.static_range(0, SPLITS, GROUP):
        split = row * SPLITS + first + tl.arange(0, GROUP)
        weight = tl.exp2(tl.load(lse_ptr + split) - m)
        part = tl.load(part_ptr + split[:, None] * D + d, d < D, other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
    out = acc / tl.where(total != 0, total, 1.0)
    # A length that the cache cannot have makes its row NaN: a GPU cannot raise, and a wrong number would go unnoticed.
    length = tl.load(lengths_ptr + row // per_batch)
    out = tl.where((length < 0) | (length > S), float("nan"), out)
    d = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), d < D)


@custom_op("minillm::decode_attention", mutates_args=())
def _op(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor,
    scale: float, left: int | None, softcap: float | None, slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """decode_attention with `left` keys of window, each tensor in any layout."""
    (B, H, T, D), (G, S) = q.shape, k_cache.shape[1:3]
    q, k, v = rows(q), rows(k_cache), rows(v_cache)
    out = q.new_empty(B, H, T, D)
    if out.numel() == 0:
        return out
    lengths = common_integers(lengths).contiguous()
    slopes = None if slopes is None else slopes.float().contiguous()
    constants = head_constants(D, q.dtype)
    key = f"d{constants['BLOCK_D']}"
    choice = dict(tuned("decode_attention", architecture(q.device), key, q.dtype))
    block_m = min(choice.pop("BLOCK_M"), max(16, triton.next_power_of_2(H // G * T)))  # tl.dot takes at least 16
    tiles = triton.cdiv(H // G * T, block_m)
    keys = S if left is None else min(S, left + T)
    splits = split_count(B * G * tiles, triton.cdiv(keys, choice["BLOCK_N"]), multiprocessors(q.device))
    part, lse = (q.new_empty(shape, dtype=torch.float32) for shape in ((B, H, T, splits, D), (B, H, T, splits)))
    _split[(B * G * tiles * splits,)](
        q, k, v, part, lse, lengths, slopes, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        scale, softcap, left, G, H // G, T, S, splits, **constants, BLOCK_M=block_m, **choice,
    )  # fmt: skip
    choice = tuned("decode_attention_combine", architecture(q.device), key, q.dtype)
    sizes = {"D": D, "BLOCK_D": constants["BLOCK_D"], "SPLITS": splits, "GROUP": min(splits, choice["GROUP"])}
    _combine[(B * H * T,)](part, lse, out, lengths, H * T, S, **(choice | sizes))
    return out


_op.register_fake(lambda q, *_: q.new_empty(q.shape))


def split_count(programs: int, blocks: int, processors: int) -> int:
    """Splits, a power of 2: two programs for each multiprocessor, as far as there are blocks of keys to hand out."""
    wanted = min(-(-2 * processors // programs), max(blocks, 1), MOST_SPLITS)
    return 1 << (wanted - 1).bit_length()


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + masks) v for q [B, H, T, D] against caches [B, G, S_max, D]  ->  [B, H, T, D].

    Causal: of the lengths [B] keys in use (any integer dtype, the T new ones included) query t, at position
    lengths − T + t, sees those up to its own position. Keys beyond lengths are never read.

    scale         D ** -0.5 where None
    window        (left, right): of the keys before its position a query sees `left`; None is unlimited
    softcap       c makes scores c · tanh(score / c), before ALiBi and the masks
    alibi_slopes  [H], adds −slope · |position − s|

    For generation: there is no gradient (asking for one raises RuntimeError). A row that may see nothing gives zeros.
    Raises ValueError where shapes, dtypes, devices or options do not fit together and, on a CPU, for lengths outside
    0 to S_max; on a GPU those make the row NaN. fp64, and head widths above 256, take the reference.
    """
    if not runs_triton(q, k_cache, v_cache, lengths) or q.shape[-1] > WIDEST:
        return decode_attention_reference(
            q,
            k_cache,
            v_cache,
            lengths,
            scale=scale,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
        )
    _check(q, k_cache, v_cache, lengths, window, softcap, alibi_slopes)
    left = None if window is None else window[0]
    left = None if left is None else min(left, k_cache.shape[2])  # no key is further back, and int32 holds the sums
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _op(q, k_cache, v_cache, lengths, scale, left, softcap, alibi_slopes)


def _check(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor,
    window: Window | None, softcap: float | None, slopes: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError where the arguments do not fit together."""
    check(q, k, v, window, softcap, slopes, None, None)
    if lengths.shape != q.shape[:1] or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths must be integers [B] = [{q.shape[0]}], not {lengths.dtype} of shape {list(lengths.shape)}"
        )
    if lengths.device != q.device:
        raise ValueError(f"q is on {q.device} but lengths on {lengths.device}: move it there")
    if lengths.device.type == "cpu" and lengths.numel() and not torch.compiler.is_compiling():
        used = lengths.to(torch.int64)
        if not 0 <= int(used.min()) <= int(used.max()) <= k.shape[2]:
            raise ValueError(f"lengths must lie in 0 to {k.shape[2]}, the cache's S_max, not {lengths.tolist()}")


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Every shipped configuration: one query and a full tile of them, plain and with every option."""
    for key, choice in shipped("decode_attention", arch).items():
        width, dtype = key.split("/")
        constants = head_constants(int(width[1:]), getattr(torch, dtype)) | {"BLOCK_N": choice["BLOCK_N"]}
        options = {name: choice[name] for name in ("num_warps", "num_stages")}
        for block_m in sorted({16, choice["BLOCK_M"]}):
            for form, absent in (("plain", ("slopes_ptr", "softcap", "left")), ("everything", ())):
                fixed = constants | {"BLOCK_M": block_m} | dict.fromkeys(absent)
                signature = {n: "constexpr" if n in fixed else _type(n, dtype) for n in _split.arg_names}
                yield AotCase(f"decode_attention/{key}/m{block_m}/{form}", _split, signature, fixed, options)
    for key, choice in shipped("decode_attention_combine", arch).items():
        width, dtype = key.split("/")
        D, group = int(width[1:]), choice["GROUP"]
        fixed = {"D": D, "BLOCK_D": max(16, D), "SPLITS": MOST_SPLITS, "GROUP": group}
        signature = {n: "constexpr" if n in fixed else _type(n, dtype) for n in _combine.arg_names}
        options = {name: choice[name] for name in ("num_warps", "num_stages")}
        yield AotCase(f"decode_attention_combine/{key}", _combine, signature, fixed, options)


def _type(name: str, dtype: str) -> str:
    """An argument's type, for tensors that are aligned and whose sizes are multiples of 16."""
    if name in ("part_ptr", "lse_ptr", "slopes_ptr"):
        return POINTERS["float32"]
    if name == "lengths_ptr":
        return "*i64:16"
    if name.endswith("_ptr"):
        return POINTERS[dtype]
    return "fp32" if name in ("scale", "softcap") else "i32:16" if name[:2] in ("q_", "k_", "v_") else "i32"
