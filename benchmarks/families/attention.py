"""Attention: dense (FlashAttention's shapes), with the masks that training has, and decoding against a long cache.

Peers: SDPA with one backend forced by name, FlexAttention compiled (building its block mask is part of each call: a
model with new documents in every batch cannot avoid it). Inputs lie as projections leave them, [B, T, H, D] in
memory, for all alike.

B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks import roofs
from benchmarks.families import INTERPRETED_DTYPES, OURS, Case, Function, compiled, directions, normal
from kernels.decode_attention import decode_attention, decode_attention_reference
from kernels.flash_attention import flash_attention, flash_attention_reference

TOKENS, WIDTH = 16384, 2048  # tokens a batch, and H·D, as FlashAttention's benchmarks have them
LARGEST_SCORES = 16 * 2**30  # bytes of scores beyond which eager attention is not tried
DOCUMENTS = (1021, 37, 2048, 301, 702, 6, 1493, 512, 3900, 89, 250, 1337, 1024, 45, 2711, 908)  # Σ = 16384
DTYPES = {"full": (torch.bfloat16,), "quick": (torch.bfloat16,), "small": INTERPRETED_DTYPES}


def dense(scale: str) -> Iterator[Case]:
    """Causal and full, head widths 64, 128, 256, groups of 1 and 4, 512 to 16k tokens; and GPT-2's own shape."""
    for dtype in DTYPES[scale]:
        if scale == "small":
            for causal in (True, False):
                yield from flash(2, 4, 2, 40, 16, dtype, {"causal": causal})
            continue
        yield from flash(64, 12, 12, 1024, 64, dtype, {"causal": True})
        for D in (64, 128, 256) if scale == "full" else (64, 128):
            for T in (512, 1024, 2048, 4096, 8192, 16384) if scale == "full" else (1024, 4096, 16384):
                for causal in (True, False) if scale == "full" else (True,):
                    for group in (1, 4) if scale == "full" else (1,):
                        H = WIDTH // D
                        yield from flash(TOKENS // T, H, H // group, T, D, dtype, {"causal": causal})


def masked(scale: str) -> Iterator[Case]:
    """Sliding windows, packed documents, ALiBi, softcap: causal all of them."""
    for dtype in DTYPES[scale]:
        if scale == "small":
            shapes = [(1, 4, 2, 40, 16)]
            options: list[dict[str, Any]] = [{"window": (8, 0)}, {"documents": [17, 3, 20]}]
        else:
            T = TOKENS if scale == "full" else 4096
            shapes = [(TOKENS // T, WIDTH // D, WIDTH // D, T, D) for D in (64, 128)]
            options = [{"window": (255, 0)}, {"window": (1023, 0)}]
            options += [{"documents": list(DOCUMENTS)}] if scale == "full" else []
        for shape in shapes:
            for option in [*options, {"alibi": True}, {"softcap": 30.0}]:
                yield from flash(*shape, dtype, {"causal": True, **option})


def flash(B: int, H: int, G: int, T: int, D: int, dtype: torch.dtype, options: dict[str, Any]) -> Iterator[Case]:
    lengths = options.get("documents")
    left = options["window"][0] if "window" in options else None
    pairs = roofs.visible_pairs(T, T, causal=options["causal"], window=left, documents=lengths)

    def inputs(device: torch.device) -> dict[str, Tensor]:
        shapes = {"q": H, "k": G, "v": G}
        made = {n: normal(B, T, h, D, device=device, dtype=dtype).transpose(1, 2) for n, h in shapes.items()}
        if options.get("alibi"):
            made["slopes"] = 2.0 ** (-8.0 * torch.arange(1, H + 1, device=device) / H)
        if lengths:
            ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            made["ids"] = ids.expand(B, T).contiguous().to(device)
        return made

    def with_options(function: Function) -> Function:
        fixed = {name: options[name] for name in ("causal", "window", "softcap") if name in options}

        def call(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
            segments = None if ids is None else (ids, ids)
            return function(q, k, v, alibi_slopes=slopes, segments=segments, **fixed)

        return call

    plain = set(options) <= {"causal", "deterministic"}
    providers = {OURS: with_options(partial(flash_attention, deterministic=options.get("deterministic", False)))}
    if B * H * T * T * 4 <= LARGEST_SCORES:
        providers["eager"] = with_options(eager_attention)
        providers["torch.compile"] = compiled(with_options(eager_attention))
    if plain:
        providers |= {
            f"SDPA {name}": sdpa(backend, causal=options["causal"], grouped=G != H)
            for name, backend in (("CUDNN", SDPBackend.CUDNN_ATTENTION), ("FLASH", SDPBackend.FLASH_ATTENTION))
        }
    providers["FlexAttention"] = flex(causal=options["causal"], left=left, softcap=options.get("softcap"))

    def case(direction: str) -> Case:
        return Case(
            kernel="flash_attention" if plain else "masked_attention",
            shape={"B": B, "H": H, "G": G, "T": T, "D": D, **options},
            direction=direction,
            dtype=dtype,
            inputs=inputs,
            fixed=("slopes", "ids"),
            providers=providers,
            torchs=by_group(with_options(eager_attention)),
            exact=by_group(with_options(flash_attention_reference)),
            work=roofs.attention_flops(B, H, D, pairs, direction),
            roof=("matmul", roofs.SQUARE, roofs.SQUARE, roofs.SQUARE),
            codegen=(f"flash_attention_{direction}/d{max(16, 1 << (D - 1).bit_length())}/",),
        )

    yield from directions(case, "forward", "backward")


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: tuple[int, int] | None = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None, segments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Attention as one writes it down, in the dtype of the inputs: two products and a softmax between them."""
    T, S, R = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(R, 1), v.repeat_interleave(R, 1)
    score = q @ k.mT * q.shape[-1] ** -0.5
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    distance = torch.arange(T, device=q.device)[:, None] + S - T - torch.arange(S, device=q.device)  # [T, S]
    if alibi_slopes is not None:
        score = score - (alibi_slopes[:, None, None] * distance.abs()).to(q.dtype)
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (distance > window[0])
    if segments is not None:
        hidden = hidden | (segments[0][:, None, :, None] != segments[1][:, None, None, :])
    return score.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def sdpa(backend: SDPBackend, *, causal: bool, grouped: bool) -> Function:
    """PyTorch's fused attention with this backend and no other: it raises where the backend cannot do the case."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return call


def flex(*, causal: bool, left: int | None, softcap: float | None) -> Function:
    """Compiled FlexAttention; its block mask is built, compiled too, in every call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attention, build = compiled(flex_attention), compiled(create_block_mask)

    def call(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            seen = t >= s if causal else t >= 0
            if left is not None:
                seen = seen & (t - s <= left)
            return seen if ids is None else seen & (ids[b, t] == ids[b, s])

        def changed(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            return score if slopes is None else score - slopes[h] * (t - s).abs()

        masks = causal or left is not None or ids is not None
        size = (q.shape[0] if ids is not None else None, None, q.shape[2], k.shape[2])
        return attention(
            q,
            k,
            v,
            score_mod=changed if softcap is not None or slopes is not None else None,
            block_mask=build(visible, *size, device=q.device) if masks else None,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    return call


def by_group(function: Function) -> Function:
    """`function` a batch entry and key/value head at a time, its scores recomputed for the gradient: the fp64 scores
    of all heads of a long row would not fit the GPU."""

    def call(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        R = q.shape[1] // k.shape[1]
        rows = []
        for b in range(q.shape[0]):
            groups = []
            for g in range(k.shape[1]):
                own = slice(g * R, (g + 1) * R)
                piece = (q[b : b + 1, own], k[b : b + 1, g : g + 1], v[b : b + 1, g : g + 1])
                piece += (None if slopes is None else slopes[own], None if ids is None else ids[b : b + 1])
                groups.append(checkpoint(function, *piece, use_reentrant=False))
            rows.append(torch.cat(groups, 1))
        return torch.cat(rows)

    return call


def decode(scale: str) -> Iterator[Case]:
    """One new query a row, 32 heads of 128 on 8 or 32 key/value heads, 512 to 32k keys."""
    if scale == "small":
        for dtype in DTYPES[scale]:
            yield decoding(2, 4, 2, 70, 16, dtype)
        return
    for B in (1, 8, 32):
        for G in (8, 32) if scale == "full" else (8,):
            for S in (512, 2048, 8192, 32768) if scale == "full" else (4096, 32768):
                yield decoding(B, 32, G, S, 128, torch.bfloat16)


def decoding(B: int, H: int, G: int, S: int, D: int, dtype: torch.dtype) -> Case:
    def inputs(device: torch.device) -> dict[str, Tensor]:
        return {
            "q": normal(B, H, 1, D, device=device, dtype=dtype),
            "k": normal(B, G, S, D, device=device, dtype=dtype),
            "v": normal(B, G, S, D, device=device, dtype=dtype),
            "lengths": torch.full((B,), S, device=device),
        }

    def eager(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        grouped = q.view(B, G, H // G, D)  # so that the cache is read once for a group, and not repeated
        return ((grouped @ k.mT * D**-0.5).softmax(-1) @ v).view(B, H, 1, D)

    def exact(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        entries = zip(*(x.split(1) for x in (q, k, v, lengths)), strict=True)  # one at a time, to fit the GPU
        return torch.cat([decode_attention_reference(*entry) for entry in entries])

    def forced(backend: SDPBackend) -> Function:
        function = sdpa(backend, causal=False, grouped=G != H)  # one query at the end sees every key
        return lambda q, k, v, lengths: function(q, k, v)

    return Case(
        kernel="decode_attention",
        shape={"B": B, "H": H, "G": G, "S": S, "D": D},
        direction="forward",
        dtype=dtype,
        inputs=inputs,
        providers={
            OURS: lambda **inputs: decode_attention(inputs["q"], inputs["k"], inputs["v"], inputs["lengths"]),
            "eager": eager,
            "torch.compile": compiled(eager),
            "SDPA CUDNN": forced(SDPBackend.CUDNN_ATTENTION),
            "SDPA FLASH": forced(SDPBackend.FLASH_ATTENTION),
        },
        torchs=eager,
        exact=exact,
        work=roofs.decode_bytes(B, G, S, D, dtype.itemsize),
        roof=("copy",),
        codegen=(f"decode_attention/d{max(16, 1 << (D - 1).bit_length())}/",),
    )
