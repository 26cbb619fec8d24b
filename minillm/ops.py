"""The one door to the kernels: each operator runs on our Triton kernels or on PyTorch's own.

B batch, T queries, S keys, H query heads, G key/value heads, D head width, M rows, N features, V vocabulary.
`select` chooses once for the process; the model never asks. On the PyTorch side a call goes to SDPA, F.rms_norm and
the like where they express it exactly, and to the kernel's own reference otherwise. A kernel is imported where it is
called: a CPU user never pays for triton.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm import cpu
from minillm.config import Kernels, UserError

_choice: Kernels = "auto"


def select(kernels: Kernels) -> None:
    """auto: Triton for tensors on a GPU, PyTorch elsewhere. Raises `UserError` where Triton cannot run at all."""
    if kernels == "triton":
        from kernels._launch import INTERPRETED

        if not _triton_is_installed():
            raise UserError(
                "kernels=triton: triton is not installed (pip install triton); take --kernels torch or auto"
            )
        if not torch.cuda.is_available() and not INTERPRETED:
            raise UserError(
                "kernels=triton needs a GPU, or TRITON_INTERPRET=1 in the environment to interpret them on the CPU "
                "(slow); take --kernels torch or auto"
            )
    global _choice
    _choice = kernels


@contextmanager
def on_torch() -> Iterator[None]:
    """While open, everything runs on PyTorch's operators, whatever was selected."""
    global _choice
    before, _choice = _choice, "torch"
    try:
        yield
    finally:
        _choice = before


def selected(device: torch.device) -> tuple[str, str]:
    """Which side runs on `device`, and why: for the plan that a run prints."""
    if _choice != "auto":
        return _choice, "chosen by --kernels"
    if device.type != "cuda":
        return "torch", f"auto: no GPU ({device.type})"
    return ("triton", "auto: a GPU") if _triton_is_installed() else ("torch", "auto: triton is not installed")


def _triton_is_installed() -> bool:
    from kernels._launch import triton

    return triton is not None


def _triton(x: Tensor) -> bool:
    return _choice == "triton" or (_choice == "auto" and x.is_cuda and _triton_is_installed())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> x weightᵀ + bias [..., N]; PyTorch's own product on either side."""
    if cpu.multiplies_few(x, weight):
        return cpu.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of x [..., N]; with `residual` returns (norm(x + residual), x + residual)."""
    if _triton(x):
        from kernels.layer_norm import layer_norm as kernel

        return kernel(x, weight, bias, eps=eps, residual=residual)
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight, bias, eps)
    return y if residual is None else (y, total)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of x [..., N]; with `residual` returns (norm(x + residual), x + residual)."""
    if _triton(x):
        from kernels.rms_norm import rms_norm as kernel

        return kernel(x, weight, eps=eps, residual=residual)
    total = x if residual is None else x + residual
    y = _rms_norm(total, weight, eps)
    return y if residual is None else (y, total)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, weight.dtype)  # under autocast; F.rms_norm warns of mixed types
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, norms: tuple[Tensor, Tensor] | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Rotates the halves of q [B, H, T, D] and k [B, G, T, D]; cos, sin [T, D/2] or [B, T, D/2].

    norms: weights [D] of an RMSNorm that q and k go through first (QK-norm).
    """
    if _triton(q):
        from kernels.rope import rope as kernel

        q_weight, k_weight = norms or (None, None)
        return kernel(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps)
    if cos.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # the same for every head
    if cpu.rotates_few(q):
        return cpu.rope(q, k, cos, sin, norms, eps)
    if norms is not None:
        q, k = _rms_norm(q, norms[0], eps), _rms_norm(k, norms[1], eps)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if _triton(gate):
        from kernels.swiglu import swiglu as kernel

        return kernel(gate, up)
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    if _triton(gate):
        from kernels.swiglu import geglu as kernel

        return kernel(gate, up)
    return F.gelu(gate) * up


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    lengths: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """q [B, H, T, D], k, v [B, G, S, D] -> [B, H, T, D]; causal puts the last query on the last key.

    `window` counts keys to the left, the query's own included (and as many to the right where not causal).
    The other arguments are those of `kernels.flash_attention`, which states the whole contract.
    """
    sides = None if window is None else (window - 1, 0 if causal else window - 1)
    if _triton(q) or softcap is not None:
        from kernels.flash_attention import flash_attention, flash_attention_reference

        kernel = flash_attention if _triton(q) else flash_attention_reference
        options: dict[str, Any] = dict(softcap=softcap, alibi_slopes=slopes, segments=segments, lengths=lengths)
        return kernel(q, k, v, causal=causal, window=sides, **options)
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    if H != G and T == 1 and slopes is None:  # a group's queries are rows over the same keys, of which none is copied
        q = q.reshape(B, G, H // G, D)
    elif H != G:
        k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    plain = sides is None and slopes is None and segments is None and lengths is None
    on_cpu, empty = cpu.attends_plainly(q, k), None
    causal_matters = causal and T > 1
    if plain and on_cpu and T <= S:
        hidden = torch.full((T, S), float("-inf"), dtype=q.dtype).triu_(S - T + 1) if causal_matters else None
        y = cpu.attention(q, k, v, hidden)
    elif plain and not on_cpu and (not causal_matters or T == S):  # torch aligns the first query with the first key
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal_matters)
    else:
        mask, empty = _mask(T, S, q.device, causal, sides, segments, lengths)
        if slopes is not None:
            at, keys = _places(T, S, q.device, lengths)
            bias = -slopes.view(1, -1, 1, 1) * (at - keys).abs().unsqueeze(1)
            mask = bias.masked_fill(~mask, float("-inf")).to(q.dtype)
        elif on_cpu:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        y = cpu.attention(q, k, v, mask) if on_cpu else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return (y if empty is None else y.masked_fill(empty, 0.0)).reshape(B, H, T, D)


def _places(T: int, S: int, device: torch.device, lengths: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Positions of the queries [1 or B, T, 1] and of the keys [1, 1, S]."""
    at, keys = torch.arange(T, device=device).view(1, T, 1), torch.arange(S, device=device).view(1, 1, S)
    shift = S - T if lengths is None else (lengths[1] - lengths[0]).view(-1, 1, 1)
    return at + shift, keys


def _mask(
    T: int,
    S: int,
    device: torch.device,
    causal: bool,
    sides: tuple[int, int] | None,
    segments: tuple[Tensor, Tensor] | None,
    lengths: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Who sees whom [1 or B, 1, T, S], and which rows see nothing [.., 1, T, 1] (None where none can)."""
    at, keys = _places(T, S, device, lengths)
    mask = keys <= at if causal else torch.ones_like(keys <= at)
    if sides is not None:
        mask = mask & (keys >= at - sides[0]) & (keys <= at + sides[1])
    if segments is not None:
        mask = mask & (segments[0].unsqueeze(2) == segments[1].unsqueeze(1))
    if lengths is not None:
        inside = torch.arange(T, device=device).view(1, T, 1) < lengths[0].view(-1, 1, 1)
        mask = mask & inside & (keys < lengths[1].view(-1, 1, 1))
    mask = mask.unsqueeze(1)
    to_itself = lengths is None and T == S and (segments is None or segments[0] is segments[1])
    if to_itself:
        return mask, None
    empty = ~mask.any(-1, keepdim=True)
    return mask | empty, empty  # a row of -inf alone would make NaN; it sees everything, and is zeroed after


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Few queries q [B, H, T, D] against caches [B, G, S_max, D] with `lengths` [B] keys in use, the T new ones too."""
    if _triton(q):
        from kernels.decode_attention import decode_attention as kernel

        sides = None if window is None else (window - 1, 0)
        return kernel(q, k_cache, v_cache, lengths, window=sides, softcap=softcap, alibi_slopes=slopes)
    queries = torch.full_like(lengths, q.shape[2])
    return attention(
        q, k_cache, v_cache, causal=True, window=window, softcap=softcap, slopes=slopes, lengths=(queries, lengths)
    )


def cross_entropy(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None
) -> Tensor:
    """Sum over the rows of logits [M, V] whose target is not -100, in fp32 or wider.

    The options are those of `kernels.cross_entropy`.
    """
    if _triton(logits):
        from kernels.cross_entropy import cross_entropy as kernel

        options: dict[str, Any] = dict(label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap)
        return kernel(logits, targets, reduction="sum", **options)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(-1).square() * (targets != -100)).sum()
    return loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """`cross_entropy` of hidden [M, N] · weightᵀ [N, V]; on Triton without ever holding [M, V] logits."""
    options: dict[str, Any] = dict(label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap)
    if _triton(hidden):
        from kernels.linear_cross_entropy import linear_cross_entropy as kernel

        return kernel(hidden, weight, targets, bias, reduction="sum", **options)
    if hidden.device.type == "cpu":
        return cpu.linear_cross_entropy(hidden, weight, targets, bias, **options)
    return cross_entropy(F.linear(hidden, weight, bias), targets, **options)
