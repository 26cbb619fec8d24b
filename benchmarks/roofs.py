"""What the hardware can do at most, measured, and what each kernel must do at least, counted.

A roof is a rate that was measured here in the same run, never one from a datasheet: bytes a second of a device copy
(read and written bytes both count), FLOP a second of a bf16 matrix product. The counts are the same for every
provider ("model" FLOPs and bytes): who recomputes or moves more than is needed does not look faster for it.

B batch, T queries, S keys, H query heads, G key/value heads, D head width; M rows, N features, V vocabulary.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.timing import as_called, quantile

COPIED = 2**30  # bytes of the tensor that is copied: far beyond any cache
SQUARE = 8192


def visible_pairs(
    T: int, S: int, *, causal: bool = False, window: int | None = None, documents: Sequence[int] | None = None
) -> float:
    """(query, key) pairs that attention must look at in one head.

    causal halves the square, T·S/2, as FlashAttention counts it. window=W is exact: with T = S, query t sees
    min(t + 1, W + 1) keys. documents (lengths that fill the row, causal inside each) give Σ length²/2.
    """
    if documents is not None:
        return sum(length * length for length in documents) / 2
    if window is not None:
        full = min(T, window + 1)
        return full * (full + 1) / 2 + (T - full) * (window + 1)
    return T * S / 2 if causal else T * S


def attention_flops(B: int, H: int, D: int, pairs: float, direction: str) -> float:
    """Two products forward, five backward of which one is recomputed: 4·B·H·D·pairs, and 2.5 times that."""
    forward = 4 * B * H * D * pairs
    return forward if direction == "forward" else 2.5 * forward


def attention_bytes(B: int, H: int, G: int, T: int, S: int, D: int, size: int, direction: str) -> int:
    """q, k, v read and out written; backward reads q, k, v, out, dout and writes dq, dk, dv."""
    queries, keys = B * H * T * D * size, B * G * S * D * size
    return 2 * queries + 2 * keys if direction == "forward" else 4 * queries + 4 * keys


def norm_bytes(M: int, N: int, size: int, direction: str, *, residual: bool) -> int:
    """x read, y written (and residual read, sum written); backward: x and dy read, dx written (and dsum read)."""
    tensors = {"forward": 4 if residual else 2, "backward": 4 if residual else 3}[direction]
    return tensors * M * N * size


def rope_bytes(B: int, T: int, H: int, G: int, D: int, size: int) -> int:
    """q and k read and written, in either direction; the angles are shared by all heads and do not count."""
    return 2 * B * T * (H + G) * D * size


def gated_bytes(M: int, F: int, size: int, direction: str) -> int:
    """gate and up read, y written; backward: dy, gate, up read, dgate and dup written."""
    return {"forward": 3, "backward": 5}[direction] * M * F * size


def cross_entropy_bytes(M: int, V: int, size: int) -> int:
    """Loss and gradient together: the logits are read once and their gradient is written once."""
    return 2 * M * V * size


def linear_cross_entropy_flops(M: int, N: int, V: int) -> int:
    """Loss and gradients together: three products of 2·M·N·V each (logits, dhidden, dweight)."""
    return 6 * M * N * V


def decode_bytes(B: int, G: int, S: int, D: int, size: int) -> int:
    """The keys and values in use, read once; one query a row is nothing beside them."""
    return 2 * B * G * S * D * size


def copy_rate() -> float:
    """Bytes a second of a device copy, those read and those written."""
    source = torch.randn(COPIED // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / (quantile(as_called(lambda: target.copy_(source)), 0.5) / 1e3)


def matmul_rate(M: int, N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP a second of [M, K] · [N, K]ᵀ on normal random numbers (zeros would run faster: less power)."""
    a, b = torch.randn(M, K, device="cuda", dtype=dtype), torch.randn(N, K, device="cuda", dtype=dtype)
    out = torch.empty(M, N, device="cuda", dtype=dtype)
    return 2 * M * N * K / (quantile(as_called(lambda: torch.mm(a, b.T, out=out)), 0.5) / 1e3)


def query_gpu() -> dict[str, Any]:
    """Driver, SM and memory clocks in MHz, power in W and temperature in °C as nvidia-smi gives them; {} without it."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = answer.stdout.strip().splitlines()
    return dict(zip(fields, values[0].split(", "), strict=False)) if answer.returncode == 0 and values else {}


def preamble() -> dict[str, Any]:
    """The ceilings of this GPU now, with its clocks before and after measuring them."""
    before = query_gpu()
    rates = {"copy": copy_rate(), f"matmul {SQUARE}³": matmul_rate(SQUARE, SQUARE, SQUARE)}
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "rates": rates,
        "before": before,
        "after": query_gpu(),
    }
