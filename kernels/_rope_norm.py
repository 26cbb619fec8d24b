"""Backward of QK-norm and RoPE in one pass: the gradient is turned back, then goes through each head's RMSNorm.

With u = n · w and n = x / rms (before the rotation) and g = du · w, as derived in rms_norm.py,

    du = the rotation of dy by the negative angle
    dx = (g − n · mean(g · n)) / rms,   dw = Σ over tokens and heads of du · n

n and rms are computed again from x, which is read anyway; dw is summed without atomics: a share for each program.
B batch, T tokens, H query heads, G key heads, D head width; 1 and 2 are the halves of a head.
"""

from __future__ import annotations

from ._launch import jit, tl


@jit
def load_angles(cos_ptr, sin_ptr, token, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """cos and sin [BLOCK_T, BLOCK_D] of these tokens, in fp32; the pointers stand at this row's angles [T, D/2]."""
    col = tl.arange(0, BLOCK_D)[None, :]
    inside = (token < T) & (col < D // 2)
    cos = tl.load(cos_ptr + token * (D // 2) + col, inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * (D // 2) + col, inside, other=0.0).to(tl.float32)
    return cos, sin


@jit
def _heads(
    dy_ptr, x_ptr, dx_ptr, w_ptr, dw_ptr,  # the first three at this batch entry, dw at this program's share [D]
    dy_head, dy_token, x_head, x_token, dx_head, dx_token,  # strides
    cos, sin, token, T, first, heads, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_D)[None, :]
    w1 = tl.load(w_ptr + col, col < D // 2, other=0.0).to(tl.float32)
    w2 = tl.load(w_ptr + D // 2 + col, col < D // 2, other=0.0).to(tl.float32)
    dw1, dw2 = tl.zeros([BLOCK_T, BLOCK_D], tl.float32), tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i in range(HEADS):
        head = (first + i).to(tl.int64)
        inside = (token < T) & (col < D // 2) & (head < heads)
        x, dy = x_ptr + head * x_head + token * x_token + col, dy_ptr + head * dy_head + token * dy_token + col
        x1 = tl.load(x, inside, other=0.0).to(tl.float32)
        x2 = tl.load(x + D // 2, inside, other=0.0).to(tl.float32)
        dy1 = tl.load(dy, inside, other=0.0).to(tl.float32)
        dy2 = tl.load(dy + D // 2, inside, other=0.0).to(tl.float32)
        du1, du2 = dy1 * cos + dy2 * sin, dy2 * cos - dy1 * sin
        inv_rms = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1, keep_dims=True) / D + eps)
        n1, n2, g1, g2 = x1 * inv_rms, x2 * inv_rms, du1 * w1, du2 * w2
        mean = tl.sum(g1 * n1 + g2 * n2, 1, keep_dims=True) / D
        dx = dx_ptr + head * dx_head + token * dx_token + col
        tl.store(dx, inv_rms * (g1 - n1 * mean), inside)
        tl.store(dx + D // 2, inv_rms * (g2 - n2 * mean), inside)
        dw1 += du1 * n1
        dw2 += du2 * n2
    tl.store(dw_ptr + col, tl.sum(dw1, 0, keep_dims=True), col < D // 2)
    tl.store(dw_ptr + D // 2 + col, tl.sum(dw2, 0, keep_dims=True), col < D // 2)


@jit
def norm_backward(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr, dq_ptr, dk_ptr,
    dw_ptr,  # [blocks of tokens, groups of heads, D] fp32: the shares of q's weight, then of k's
    dq_out_batch, dq_out_head, dq_out_token, dk_out_batch, dk_out_head, dk_out_token,  # strides
    q_batch, q_head, q_token, k_batch, k_head, k_token, cos_batch,
    dq_batch, dq_head, dq_token, dk_batch, dk_head, dk_token,
    H, G, T, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, group of heads): the first groups hold query heads, the others key heads."""
    blocks = tl.cdiv(T, BLOCK_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)  # int64: offsets pass 2^31 in large batches
    token = ((tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)
    cos, sin = load_angles(cos_ptr + b * cos_batch, sin_ptr + b * cos_batch, token, T, D, BLOCK_D)
    group, q_groups = tl.program_id(1), tl.cdiv(H, HEADS)
    dw = dw_ptr + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + group) * D
    if group < q_groups:
        _heads(
            dq_out_ptr + b * dq_out_batch, q_ptr + b * q_batch, dq_ptr + b * dq_batch, qw_ptr, dw,
            dq_out_head, dq_out_token, q_head, q_token, dq_head, dq_token,
            cos, sin, token, T, group * HEADS, H, eps, D, BLOCK_D, BLOCK_T, HEADS,
        )  # fmt: skip
    else:
        _heads(
            dk_out_ptr + b * dk_out_batch, k_ptr + b * k_batch, dk_ptr + b * dk_batch, kw_ptr, dw,
            dk_out_head, dk_out_token, k_head, k_token, dk_head, dk_token,
            cos, sin, token, T, (group - q_groups) * HEADS, G, eps, D, BLOCK_D, BLOCK_T, HEADS,
        )  # fmt: skip
