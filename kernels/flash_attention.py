"""Attention without its matrix: softmax(scale · q kᵀ + masks) v in tiles, forward and backward.

B batch, T queries, S keys, H query heads, G key/value heads (H a multiple of G), D head width.
"""

import torch
from torch import Tensor

Window = tuple[int | None, int | None]
Pair = tuple[Tensor, Tensor]


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
    _check(q, k, v, window, softcap, alibi_slopes, segments, lengths)
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
    return flash_attention_reference(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        segments=segments,
        lengths=lengths,
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window | None,
    softcap: float | None,
    slopes: Tensor | None,
    segments: Pair | None,
    lengths: Pair | None,
) -> None:
    """Raises ValueError, in one line that says what to give instead, where the arguments do not fit together."""
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(
            f"attention takes q [B, H, T, D] and k, v [B, G, S, D], not {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k {[*k.shape]} and v {[*v.shape]} must both be [B, G, S, D] with q's B = {B} and D = {D}")
    if D == 0 or G == 0 or H % G:
        raise ValueError(f"q's {H} heads must be a multiple of k's {G}, and the head width ({D}) at least 1")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k, v must have one floating-point dtype, not {q.dtype}, {k.dtype}, {v.dtype}: cast them")
    if window is not None and (len(window) != 2 or any(side is not None and side < 0 for side in window)):
        raise ValueError(f"window is (left, right), each a count of keys >= 0 or None for unlimited, not {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, or None for no cap, not {softcap}")
    extra = {"alibi_slopes": (slopes, (H,))} if slopes is not None else {}
    for name, pair, shapes in (("segments", segments, ((B, T), (B, S))), ("lengths", lengths, ((B,), (B,)))):
        if pair is None:
            continue
        for side, ids, shape in zip(("queries", "keys"), pair, shapes, strict=True):
            if ids.is_floating_point() or ids.dtype == torch.bool:
                raise ValueError(f"{name} of the {side} must be integers, not {ids.dtype}")
            extra[f"{name} of the {side}"] = (ids, shape)
    for name, (x, shape) in extra.items():
        if x.shape != shape:
            raise ValueError(f"{name} must have the shape {[*shape]}, not {[*x.shape]}")
    for name, x in {"k": k, "v": v, **{name: x for name, (x, _) in extra.items()}}.items():
        if x.device != q.device:
            raise ValueError(f"q is on {q.device} but {name} on {x.device}: move it there")
    if lengths is not None and q.device.type == "cpu" and not torch.compiler.is_compiling():
        for side, x, longest in zip(("queries", "keys"), lengths, (T, S), strict=True):
            if x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= longest:
                raise ValueError(f"lengths of the {side} must lie in 0 to {longest}, not {x.tolist()}")
