"""RoPE: the token at position t has each of its D/2 pairs (x_i, x_{i+D/2}) turned by the angle t · θ_i.

    y_i       = x_i · cos_i − x_{i+D/2} · sin_i
    y_{i+D/2} = x_{i+D/2} · cos_i + x_i · sin_i

A scalar product of two turned vectors then depends on the distance of their positions alone. q and k are turned in one
launch, and a program reads its cos and sin once for several heads. A rotation's transpose is the rotation by the
negative angle, so backward is the same kernel with −sin.

With QK-norm each head is first divided by its rms and scaled, so that one read and one write do both; its backward
is in _rope_norm.py.

Sources: Su et al., "RoFormer" (2021), eq. 34, with Llama's pairing of the two halves; QK-norm: Henry et al., "Query-Key
Normalization for Transformers" (2020), here as RMSNorm with a weight (Qwen3).
B batch, T tokens, H query heads, G key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.library import custom_op

from ._launch import POINTERS, AotCase, architecture, as_rows, jit, runs_triton, shipped, tl, triton, tuned
from ._rope_norm import load_angles, norm_backward

WIDEST = 512  # a head of this width fits into registers; wider ones go through the reference


def rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The definition: at least fp32 inside, the input's dtype outside; cos and sin get no gradient."""
    _check(q, k, cos, sin, q_weight, k_weight)
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (angle.detach().to(wide).unsqueeze(-3) for angle in (cos, sin))  # [(B,) 1, T, D/2]: one for all heads

    def rotate(x: Tensor, weight: Tensor | None) -> Tensor:
        y = x.to(wide)
        if weight is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
        first, second = y.chunk(2, -1)  # [B, heads, T, D/2]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

    return rotate(q, q_weight), rotate(k, k_weight)


def _check(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None
) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q [B, H, T, D] and k [B, G, T, D] must share B, T and D, not {list(q.shape)}, {list(k.shape)}"
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"q and k must share one float dtype, not {q.dtype} and {k.dtype}")
    B, _, T, D = q.shape
    if D == 0 or D % 2:
        raise ValueError(f"the head width {D} must be even: RoPE turns pairs of features")
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.shape not in ((T, D // 2), (B, T, D // 2)):
            raise ValueError(
                f"{name} must be [T, D/2] = {[T, D // 2]} or [B, T, D/2] = {[B, T, D // 2]}, not {list(angle.shape)}"
            )
    if cos.shape != sin.shape:
        raise ValueError(f"cos {list(cos.shape)} and sin {list(sin.shape)} must have the same shape")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("QK-norm needs both q_weight and k_weight: give the other one too, or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.shape != (D,):
            raise ValueError(f"{name} must have shape [{D}], the head width, not {list(weight.shape)}")


@jit
def _rotate_heads(
    x_ptr, y_ptr, w_ptr, x_head, x_token, y_head, y_token,  # pointers at this batch entry; strides of heads and tokens
    cos, sin, token, T, first, heads, eps,
    NORM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_D)[None, :]
    if NORM:
        w1 = tl.load(w_ptr + col, col < D // 2, other=0.0).to(tl.float32)
        w2 = tl.load(w_ptr + D // 2 + col, col < D // 2, other=0.0).to(tl.float32)
    for i in range(HEADS):
        head = (first + i).to(tl.int64)
        inside = (token < T) & (col < D // 2) & (head < heads)
        x = x_ptr + head * x_head + token * x_token + col
        x1 = tl.load(x, inside, other=0.0).to(tl.float32)
        x2 = tl.load(x + D // 2, inside, other=0.0).to(tl.float32)
        if NORM:
            inv_rms = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1, keep_dims=True) / D + eps)
            x1, x2 = x1 * inv_rms * w1, x2 * inv_rms * w2
        y = y_ptr + head * y_head + token * y_token + col
        tl.store(y, x1 * cos - x2 * sin, inside)
        tl.store(y + D // 2, x2 * cos + x1 * sin, inside)


@jit
def _rotate(
    q_ptr, k_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr, q_out_ptr, k_out_ptr,  # cos, sin [T, D/2] or [B, T, D/2]
    q_batch, q_head, q_token, k_batch, k_head, k_token, cos_batch,  # strides
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    H, G, T, eps,
    NORM: tl.constexpr, INVERSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)  # int64: offsets pass 2^31 in large batches
    token = ((tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)  # [BLOCK_T, 1]
    cos, sin = load_angles(cos_ptr + b * cos_batch, sin_ptr + b * cos_batch, token, T, D, BLOCK_D)
    if INVERSE:
        sin = -sin
    group, q_groups = tl.program_id(1), tl.cdiv(H, HEADS)
    if group < q_groups:
        _rotate_heads(
            q_ptr + b * q_batch, q_out_ptr + b * q_out_batch, qw_ptr, q_head, q_token, q_out_head, q_out_token,
            cos, sin, token, T, group * HEADS, H, eps, NORM, D, BLOCK_D, HEADS,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr + b * k_batch, k_out_ptr + b * k_out_batch, kw_ptr, k_head, k_token, k_out_head, k_out_token,
            cos, sin, token, T, (group - q_groups) * HEADS, G, eps, NORM, D, BLOCK_D, HEADS,
        )  # fmt: skip


def _head_class(D: int) -> str:
    return f"d{max(16, triton.next_power_of_2(D))}"


def _empty_pair(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs laid out as the inputs, so that heads stay where the projections' views have them."""
    return torch.empty_like(as_rows(q)), torch.empty_like(as_rows(k))


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, weights: tuple[Tensor, Tensor] | None, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _empty_pair(q, k)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    q, k, cos, sin = as_rows(q), as_rows(k), cos.contiguous(), sin.contiguous()
    qw, kw = (w.contiguous() for w in weights) if weights else (cos, cos)
    (B, H, T, D), G = q.shape, k.shape[1]
    choice = tuned("rope", architecture(q.device), _head_class(D), q.dtype)
    grid = B * triton.cdiv(T, choice["BLOCK_T"]), triton.cdiv(H, choice["HEADS"]) + triton.cdiv(G, choice["HEADS"])
    _rotate[grid](
        q, k, cos, sin, qw, kw, q_out, k_out, *q.stride()[:3], *k.stride()[:3], cos.stride(0) if cos.dim() == 3 else 0,
        *q_out.stride()[:3], *k_out.stride()[:3], H, G, T, eps,
        NORM=weights is not None, INVERSE=inverse, D=D, BLOCK_D=triton.next_power_of_2(D // 2), **choice,
    )  # fmt: skip
    return q_out, k_out


@custom_op("minillm::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k [B, G, T, D], cos, sin [T, D/2] or [B, T, D/2]  ->  both turned, or turned back."""
    return _launch(q, k, cos, sin, None, 0.0, inverse)


def _rope_save(ctx, inputs, output):
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rope_gradient(ctx, dq, dk):
    return *_rope(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope.register_fake(lambda q, k, cos, sin, inverse: _empty_pair(q, k))
_rope.register_autograd(_rope_gradient, setup_context=_rope_save)


@custom_op("minillm::rope_norm", mutates_args=())
def _rope_norm(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As minillm::rope after an RMSNorm of each head by q_weight, k_weight [D]."""
    return _launch(q, k, cos, sin, (q_weight, k_weight), eps, False)


@custom_op("minillm::rope_norm_backward", mutates_args=())
def _rope_norm_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    q_weight: Tensor, k_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of both outputs  ->  of q and k, and of q_weight and k_weight [D] in fp32."""
    (B, H, T, D), G = q.shape, k.shape[1]
    dq, dk = _empty_pair(q, k)
    if q.numel() + k.numel() == 0:
        return dq, dk, *(q.new_zeros(D, dtype=torch.float32) for _ in range(2))  # outputs must not share memory
    dq_out, dk_out, q, k = (as_rows(x) for x in (dq_out, dk_out, q, k))
    cos, sin, qw, kw = (x.contiguous() for x in (cos, sin, q_weight, k_weight))
    choice = tuned("rope_norm_backward", architecture(q.device), _head_class(D), q.dtype)
    q_groups, k_groups = triton.cdiv(H, choice["HEADS"]), triton.cdiv(G, choice["HEADS"])
    grid = B * triton.cdiv(T, choice["BLOCK_T"]), q_groups + k_groups
    shares = q.new_empty((*grid, D), dtype=torch.float32)
    norm_backward[grid](
        dq_out, dk_out, q, k, cos, sin, qw, kw, dq, dk, shares,
        *dq_out.stride()[:3], *dk_out.stride()[:3], *q.stride()[:3], *k.stride()[:3],
        cos.stride(0) if cos.dim() == 3 else 0, *dq.stride()[:3], *dk.stride()[:3], H, G, T, eps,
        D=D, BLOCK_D=triton.next_power_of_2(D // 2), **choice,
    )  # fmt: skip
    return dq, dk, shares[:, :q_groups].sum((0, 1)), shares[:, q_groups:].sum((0, 1))


def _rope_norm_save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _rope_norm_gradient(ctx, dq_out, dk_out):
    q_weight, k_weight = ctx.saved_tensors[-2:]
    dq, dk, dqw, dkw = _rope_norm_backward(dq_out, dk_out, *ctx.saved_tensors, ctx.eps)
    return dq, dk, None, None, dqw.to(q_weight.dtype), dkw.to(k_weight.dtype), None


_rope_norm.register_fake(lambda q, k, cos, sin, q_weight, k_weight, eps: _empty_pair(q, k))
_rope_norm.register_autograd(_rope_norm_gradient, setup_context=_rope_norm_save)


@_rope_norm_backward.register_fake
def _(dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, eps):
    return *_empty_pair(q, k), *(q.new_empty(q.shape[-1], dtype=torch.float32) for _ in range(2))


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D] and k [B, G, T, D] turned by the angles of their positions, as new tensors of the same layout.

    cos, sin: [T, D/2], or [B, T, D/2] where each row has positions of its own; any float dtype, without gradient.
    q_weight, k_weight: [D] both, for QK-norm: q and k are first divided by sqrt(mean(x²) + eps) over D and scaled.
    Fused where Triton runs and D <= 512, the reference elsewhere. Any strides are right.

    Raises ValueError where the shapes or dtypes do not fit each other, or D is odd.
    Source: Su et al. (2021), eq. 34, halves paired as in Llama.
    """
    _check(q, k, cos, sin, q_weight, k_weight)
    tensors = (q, k, cos, sin) if q_weight is None else (q, k, cos, sin, q_weight, k_weight)
    if q.shape[-1] > WIDEST or not runs_triton(*tensors):
        return rope_reference(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps)
    return _rope(*tensors, False) if q_weight is None else _rope_norm(*tensors, eps)


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Every shipped configuration, plain and with QK-norm; turning back compiles to the same as turning."""
    forms = (
        ("rope", "rope", _rotate, {"NORM": False, "INVERSE": False}),
        ("rope_norm", "rope", _rotate, {"NORM": True, "INVERSE": False}),
        ("rope_norm_backward", "rope_norm_backward", norm_backward, {}),
    )
    for name, table, function, flags in forms:
        for key, choice in shipped(table, arch).items():
            shape, dtype = key.split("/")
            D = int(shape[1:])
            constexprs = {**flags, "D": D, "BLOCK_D": D // 2, "BLOCK_T": choice["BLOCK_T"], "HEADS": choice["HEADS"]}
            kinds = {name: POINTERS[dtype] for name in function.arg_names if name.endswith("_ptr")}
            wide = ("cos_ptr", "sin_ptr", "qw_ptr", "kw_ptr", "dw_ptr")  # weights too, as in training under autocast
            kinds |= dict.fromkeys(wide, POINTERS["float32"])
            kinds |= {**dict.fromkeys(("H", "G", "T"), "i32"), "eps": "fp32", **dict.fromkeys(constexprs, "constexpr")}
            signature = {name: kinds.get(name, "i32:16") for name in function.arg_names}  # the rest are strides
            yield AotCase(f"{name}/{key}", function, signature, constexprs, {"num_warps": choice["num_warps"]})
