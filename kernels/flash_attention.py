"""Attention without its matrix: out = softmax(scale · q kᵀ + masks) v in tiles, forward and backward.

B batch, T queries, S keys, H query heads, G key/value heads (H a multiple of G), D head width.

The matrices S = scale · q kᵀ and P = softmax(S) are [T, S] for every head, and writing them to memory and reading them
back costs more than all the arithmetic. Here no program ever holds more of them than one tile. For the forward pass
that takes an online softmax (`_flash_forward.py`). Here is the backward pass; `README.md` is the ladder up to it.

**Given** dO = ∂L/∂O for O = P V, wanted dQ, dK, dV. For one query i and key j, with the sums written out:

    S_ij = scale · q_i·k_j        P_ij = exp(S_ij) / Σ_j' exp(S_ij') = exp(S_ij − lse_i)        o_i = Σ_j P_ij v_j

**V** enters o_i linearly, and so does P:

    dV_j = Σ_i P_ij dO_i          (dV = Pᵀ dO)
    dP_ij = dO_i · v_j            (dP = dO Vᵀ)

**The softmax** has the Jacobian ∂P_ij / ∂S_il = P_ij (1[j = l] − P_il), since raising one score lowers every other
weight of its row. Therefore

    dS_il = Σ_j dP_ij P_ij (1[j = l] − P_il) = P_il (dP_il − δ_i),        δ_i = Σ_j P_ij dP_ij

δ_i looks like a sum over the whole row, which no tile has. But put dP_ij = dO_i · v_j into it:

    δ_i = Σ_j P_ij (dO_i · v_j) = dO_i · Σ_j P_ij v_j = dO_i · o_i

so it is a product of two vectors of width D that are there already: `row_delta` computes it once for each row.

**The scores** are linear in q and k:

    dQ_i = scale · Σ_j dS_ij k_j          (dQ = scale · dS K)
    dK_j = scale · Σ_i dS_ij q_i          (dK = scale · dSᵀ Q)

Every right-hand side is now a sum over tiles, and P_ij comes back from q_i, k_j and lse_i by one product and one
exponential: recomputing it is cheaper than reading it. That makes five products a tile (S, dP, dV, dK, dQ).
What is summed over i (dK, dV) wants a program for each block of keys, what is summed over j (dQ) one for each block of
queries; `_flash_backward.py` says how that conflict is resolved. With grouped heads dK_j, dV_j sum over the group too.

Softcap: S = c tanh(S̃ / c) puts a factor 1 − tanh² between dS and dS̃. ALiBi adds a constant, whose derivative is 0.
A masked pair has P_ij = 0, hence no gradient; a row that sees nothing has lse = +∞ here, hence P = 0 all along.

Sources: Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention", appendix B.2 (the derivation, δ
among it) and B.4; Dao 2023, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", §3.1
(lse alone is kept, one program for each block of keys, dQ by atomic additions); Milakov & Gimelshein 2018, "Online
normalizer calculation for softmax". ALiBi: Press et al. 2021, "Train Short, Test Long". Softcap: Gemma 2 (2024), §2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from ._flash_backward import row_delta
from ._flash_launch import DTYPES, WIDEST, Call, Pair, Window, aot_cases, check, rows
from ._launch import runs_triton, triton

__all__ = ["aot_cases", "flash_attention", "flash_attention_reference"]


def flash_attention_reference(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, G, S, D]
    v: Tensor,  # [B, G, S, D]
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,  # [H]
    segments: Pair | None = None,  # [B, T], [B, S]
    lengths: Pair | None = None,  # [B], [B]
    deterministic: bool = False,
) -> Tensor:
    """The definition, with the whole score matrix in memory: at least fp32 inside, q.dtype outside.

    Takes what `flash_attention` takes and raises what it raises; in fp64 it is what the tests trust.
    """
    check(q, k, v, window, softcap, alibi_slopes, segments, lengths)
    (B, H, T, D), (G, S), device = q.shape, k.shape[1:3], q.device
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).reshape(B, G, H // G, T, D)
    score = torch.einsum("bgrtd,bgsd->bgrts", grouped, k.to(wide)) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)

    t, s = torch.arange(T, device=device)[:, None], torch.arange(S, device=device)
    q_lengths, kv_lengths = (x.long().view(B, 1, 1) for x in lengths) if lengths is not None else (T, S)
    position = t + kv_lengths - q_lengths  # [T, 1], or [B, T, 1] with lengths
    if alibi_slopes is not None:
        distance = (position - s).abs().to(wide)
        slopes = alibi_slopes.detach().to(wide).view(G, H // G, 1, 1)
        score = score - slopes * (distance if lengths is None else distance[:, None, None])

    left, right = window if window is not None else (None, None)
    visible = (t < q_lengths) & (s < kv_lengths)  # [T, S], or [B, T, S] with lengths
    if causal:
        visible = visible & (s <= position)
    if left is not None:
        visible = visible & (s >= position - left)
    if right is not None:
        visible = visible & (s <= position + right)
    if segments is not None:
        visible = visible & (segments[0].long()[:, :, None] == segments[1].long()[:, None, :])
    visible = visible.expand(B, T, S)[:, None, None]  # [B, 1, 1, T, S]

    # A row that sees nothing is all -inf, whose softmax would be NaN: it is given zeros before and after.
    seen = visible.any(-1, keepdim=True)
    weight = score.masked_fill(~visible & seen, float("-inf")).softmax(-1).masked_fill(~visible, 0.0)
    return torch.einsum("bgrts,bgsd->bgrtd", weight, v.to(wide)).reshape(B, H, T, D).to(q.dtype)


def _heads(B: int, T: int, H: int, D: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[B, H, T, D] laid out as [B, T, H, D], so that merging the heads afterwards is a view."""
    return like.new_empty(B, T, H, D, dtype=dtype).transpose(1, 2)


def _sum_groups(shares: Tensor, k: Tensor) -> Tensor:
    """[B, H, S, D], a share for each query head  ->  [B, G, S, D]."""
    B, G, S, D = k.shape
    by_group = shares.transpose(1, 2).view(B, S, G, shares.shape[1] // G, D)  # as it lies in memory
    return by_group.sum(3).to(k.dtype).transpose(1, 2)


@custom_op("minillm::flash_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
    scale: float,
    softcap: float | None,
    left: int | None,
    right: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """-> out [B, H, T, D], lse [B, H, T] = log2 Σ exp(score), fp32.

    `scale` > 0; causal is right = 0; deterministic is for the backward.
    """
    call = Call(q, k, slopes, q_ids, kv_ids, q_lengths, kv_lengths, scale, softcap, left, right)
    out, lse = _empty_outputs(q)
    q, k, v = rows(q), rows(k), rows(v)
    with torch.cuda.device_of(q):
        call.launch("flash_attention_forward", q, k, v, out, lse, strided=(q, k, v))
    return out, lse


@custom_op("minillm::flash_attention_backward", mutates_args=())
def _op_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slopes: Tensor | None,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
    scale: float,
    softcap: float | None,
    left: int | None,
    right: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv in the shapes and dtype of q, k, v."""
    call = Call(q, k, slopes, q_ids, kv_ids, q_lengths, kv_lengths, scale, softcap, left, right)
    B, H, T, D = q.shape
    dq, dk, dv = _empty_gradients(q, k)
    grouped = k.shape[1] != H
    if grouped:  # one share for each query head, in fp32 for the sum over the group
        dk, dv = (_heads(B, k.shape[2], H, D, k, torch.float32) for _ in range(2))
    do, q, k, v, out, lse = (*map(rows, (do, q, k, v, out)), lse.contiguous())
    delta = torch.empty_like(lse)
    shared = {"strided": (q, k, v, do)}
    with torch.cuda.device_of(q):
        if delta.numel():
            sizes = {"D": D, "BLOCK_D": call.constants["BLOCK_D"], "BLOCK_M": 32}
            row_delta[(B * H * triton.cdiv(T, 32),)](out, do, delta, *out.stride()[:3], *do.stride()[:3], H, T, **sizes)
        tensors = q, k, v, do, lse, delta
        if deterministic:
            call.launch("flash_attention_backward_keys", *tensors, None, dk, dv, own_keys=True, **shared)
            call.launch("flash_attention_backward_queries", *tensors, dq, **shared)
        else:
            sums = _heads(B, T, H, D, q, torch.float32).zero_()
            call.launch("flash_attention_backward", *tensors, sums, dk, dv, own_keys=True, **shared)
            torch.mul(sums, scale, out=dq)
    if grouped:
        dk, dv = (_sum_groups(x, k) for x in (dk, dv))
    return dq, dk, dv


def _empty_outputs(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    return _heads(B, T, H, D, q), q.new_empty(B, H, T, dtype=torch.float32)


def _empty_gradients(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    return _heads(B, T, H, D, q), _heads(B, S, G, D, k), _heads(B, S, G, D, k)


def _save(ctx, inputs, output):
    q, k, v, *options = inputs
    ctx.save_for_backward(q, k, v, *output, *options[:5])
    ctx.numbers = options[5:]


def _gradient(ctx, do, _):
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    return *_op_backward(do, q, k, v, out, lse, *tensors, *ctx.numbers), *[None] * 10


_op.register_fake(_empty_outputs)
_op_backward.register_fake(lambda do, q, k, *_: _empty_gradients(q, k))
_op.register_autograd(_gradient, setup_context=_save)


def flash_attention(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, G, S, D]
    v: Tensor,  # [B, G, S, D]
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,  # [H]
    segments: Pair | None = None,  # [B, T], [B, S]
    lengths: Pair | None = None,  # [B], [B]
    deterministic: bool = False,
) -> Tensor:
    """softmax(scale · q kᵀ + masks) v for q [B, H, T, D] and k, v [B, G, S, D]  ->  [B, H, T, D].

    Query t stands at position t + S - T of its row, counted from the true lengths where those are given.

    causal: a query sees the keys up to its own position, so the last query is aligned with the last key.
    window: (left, right), how many keys on either side of its position it sees; None is unlimited.
    scale: D ** -0.5 where None.
    softcap: c makes scores c · tanh(score / c), before ALiBi and the masks.
    alibi_slopes: [H], adds -slope · |position - s|; gets no gradient.
    segments: (ids of the queries [B, T], ids of the keys [B, S]), any integers in any order; a query sees the keys
        of its own id only.
    lengths: (queries [B], keys [B]) in use, from the front; what lies beyond is padding and its rows are zeros.
    deterministic: gradients equal bit for bit in every run, for a slower backward.

    A row that may see nothing gives zeros and zero gradients. Raises ValueError where shapes, dtypes, devices or
    options do not fit together.
    """
    check(q, k, v, window, softcap, alibi_slopes, segments, lengths)
    tensors = [x for x in (q, k, v, alibi_slopes, *(segments or ()), *(lengths or ())) if x is not None]
    if not runs_triton(*tensors) or q.dtype not in DTYPES or q.shape[-1] > WIDEST:
        return flash_attention_reference(
            q, k, v, causal=causal, window=window, scale=scale, softcap=softcap,
            alibi_slopes=alibi_slopes, segments=segments, lengths=lengths,
        )  # fmt: skip
    T, S = q.shape[2], k.shape[2]
    # No key is T + S away, and sums with a larger bound could leave int32.
    left, right = (None if side is None else min(side, T + S) for side in window or (None, None))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale <= 0:  # the kernels take the maximum before they scale
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    out, _ = _op(
        q, k, v, alibi_slopes.detach() if alibi_slopes is not None else None,
        *(segments or (None, None)), *(lengths or (None, None)),
        scale, softcap, left, 0 if causal else right, deterministic or torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out
