"""LayerNorm, RMSNorm (alone and with the residual addition), RoPE, SwiGLU: all limited by memory, so roof = copy.

M rows (tokens), N features, F features of the MLP; B batch, T tokens, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import roofs
from benchmarks.families import INTERPRETED_DTYPES, Case, Function, directions, liger, normal, peers
from kernels.layer_norm import layer_norm, layer_norm_reference
from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.rope import rope, rope_reference
from kernels.swiglu import swiglu, swiglu_reference

WIDTHS = {"full": (768, 1024, 2048, 4096, 8192, 16384), "quick": (768, 4096), "small": (96,)}
TOKENS = {"full": (4096, 16384, 65536), "quick": (16384,), "small": (7,)}
HIDDEN = {"full": (3072, 2816, 11008, 14336), "quick": (3072, 11008), "small": (100,)}
HEADS = {"full": ((12, 12, 64), (32, 8, 128)), "quick": ((12, 12, 64), (32, 8, 128)), "small": ((4, 2, 16),)}
LENGTH = 2048  # tokens of a row in the RoPE cases
DTYPES = {"full": (torch.bfloat16,), "quick": (torch.bfloat16,), "small": INTERPRETED_DTYPES}


def _eager_rms(x: Tensor, weight: Tensor, residual: Tensor | None = None):
    total = x if residual is None else x + residual
    y = F.rms_norm(total, weight.shape, weight, 1e-6)
    return y if residual is None else (y, total)


def _eager_layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None):
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight, bias, 1e-5)
    return y if residual is None else (y, total)


def _liger_rms(x: Tensor, weight: Tensor, residual: Tensor | None = None):
    from liger_kernel.transformers import functional

    if residual is None:
        return functional.liger_rms_norm(x, weight, 1e-6, in_place=False)
    return functional.liger_fused_add_rms_norm(x, residual, weight, 1e-6, in_place=False)


def _liger_layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None):
    from liger_kernel.transformers import functional

    total = x if residual is None else x + residual
    y = functional.liger_layer_norm(total, weight, bias, 1e-5)
    return y if residual is None else (y, total)


NORMS: dict[str, tuple[Function, Function, Function, Function]] = {  # ours, reference, eager PyTorch, Liger
    "rms_norm": (rms_norm, rms_norm_reference, _eager_rms, _liger_rms),
    "layer_norm": (layer_norm, layer_norm_reference, _eager_layer, _liger_layer),
}


def rms_norms(scale: str) -> Iterator[Case]:
    yield from _norms("rms_norm", scale)


def layer_norms(scale: str) -> Iterator[Case]:
    yield from _norms("layer_norm", scale)


def _norms(kernel: str, scale: str) -> Iterator[Case]:
    for dtype in DTYPES[scale]:
        for M in TOKENS[scale]:
            for N in WIDTHS[scale]:
                for residual in (False, True):
                    for direction in ("forward", "backward"):
                        yield norm(kernel, M, N, dtype, direction, residual=residual)


def norm(kernel: str, M: int, N: int, dtype: torch.dtype, direction: str, *, residual: bool = False) -> Case:
    """One norm of x [M, N]; with `residual` of the sum, which is an output too."""
    ours, exact, eager, ligers = NORMS[kernel]
    vectors = ["weight", "bias"] if kernel == "layer_norm" else ["weight"]

    def inputs(device: torch.device) -> dict[str, Tensor]:
        rows = {name: normal(M, N, device=device, dtype=dtype) for name in ["x"] + ["residual"] * residual}
        return rows | {name: normal(N, device=device, dtype=dtype) for name in vectors}

    return Case(
        kernel=kernel,
        shape={"M": M, "N": N} | ({"residual": True} if residual else {}),
        direction=direction,
        dtype=dtype,
        inputs=inputs,
        providers=peers(ours, eager, **liger(liger=ligers)),
        torchs=eager,
        exact=exact,
        work=roofs.norm_bytes(M, N, dtype.itemsize, direction, residual=residual),
        roof=("copy",),
        codegen=(f"{kernel}_{direction}/n{max(128, 1 << (N - 1).bit_length())}/",),
    )


def ropes(scale: str) -> Iterator[Case]:
    for dtype in DTYPES[scale]:
        for tokens in TOKENS[scale]:
            for H, G, D in HEADS[scale]:
                T = min(tokens, LENGTH)
                yield from rotation(tokens // T, T, H, G, D, dtype)


def rotation(B: int, T: int, H: int, G: int, D: int, dtype: torch.dtype) -> Iterator[Case]:
    def inputs(device: torch.device) -> dict[str, Tensor]:
        angle = torch.arange(T, device=device)[:, None] * 1e4 ** (-torch.arange(D // 2, device=device) / (D // 2))
        return {
            "q": normal(B, T, H, D, device=device, dtype=dtype).transpose(1, 2),  # as projections leave them
            "k": normal(B, T, G, D, device=device, dtype=dtype).transpose(1, 2),
            "cos": angle.cos(),
            "sin": angle.sin(),
        }

    def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
        cos, sin = (torch.cat((angle, angle), -1).to(q.dtype) for angle in (cos, sin))

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        return turned(q), turned(k)

    def ligers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
        from liger_kernel.transformers import functional

        cos, sin = (torch.cat((angle, angle), -1)[None] for angle in (cos, sin))
        return functional.liger_rope(q, k, cos, sin)

    def case(direction: str) -> Case:
        return Case(
            kernel="rope",
            shape={"B": B, "T": T, "H": H, "G": G, "D": D},
            direction=direction,
            dtype=dtype,
            inputs=inputs,
            fixed=("cos", "sin"),
            providers=peers(rope, eager, **liger(liger=ligers)),
            torchs=eager,
            exact=rope_reference,
            work=roofs.rope_bytes(B, T, H, G, D, dtype.itemsize),
            roof=("copy",),
            codegen=(f"rope/d{max(16, 1 << (D - 1).bit_length())}/",),
        )

    yield from directions(case, "forward", "backward")


def swiglus(scale: str) -> Iterator[Case]:
    for dtype in DTYPES[scale]:
        for M in TOKENS[scale]:
            for width in HIDDEN[scale]:
                yield from gated(M, width, dtype)


def gated(M: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    def inputs(device: torch.device) -> dict[str, Tensor]:
        return {name: normal(M, width, device=device, dtype=dtype) for name in ("gate", "up")}

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def ligers(gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.transformers import functional

        return functional.liger_swiglu(gate, up)

    def case(direction: str) -> Case:
        return Case(
            kernel="swiglu",
            shape={"M": M, "F": width},
            direction=direction,
            dtype=dtype,
            inputs=inputs,
            providers=peers(swiglu, eager, **liger(liger=ligers)),
            torchs=eager,
            exact=swiglu_reference,
            work=roofs.gated_bytes(M, width, dtype.itemsize, direction),
            roof=("copy",),
            codegen=(f"gated_{direction}/silu/",),
        )

    yield from directions(case, "forward", "backward")
