"""Cross-entropy of logits, and of hidden states without their logits. Always loss and gradient together ("both"):
our kernels compute the gradient in the pass that computes the loss, so that neither half has a time of its own.

M rows (tokens), N features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import roofs
from benchmarks.families import INTERPRETED_DTYPES, Case, liger, normal, peers
from kernels.cross_entropy import cross_entropy, cross_entropy_reference
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

TOKENS = {"full": (8192, 32768), "quick": (8192,), "small": (6,)}
SIZES = {  # features, vocabulary
    "full": ((768, 50304), (2048, 32768), (4096, 128256)),
    "quick": ((768, 50304), (4096, 128256)),
    "small": ((24, 130),),
}
DTYPES = {"full": (torch.bfloat16,), "quick": (torch.bfloat16,), "small": INTERPRETED_DTYPES}
PIECE = 2048  # rows that the fp64 reference takes at a time: all at once they would not fit the GPU
IGNORED = -100


def _labels(M: int, V: int, device: torch.device) -> Tensor:
    labels = torch.randint(V, (M,), device=device)
    return torch.where(torch.arange(M, device=device) % 10 == 3, IGNORED, labels)  # a tenth does not count


def cross_entropies(scale: str) -> Iterator[Case]:
    for dtype in DTYPES[scale]:
        for M in TOKENS[scale]:
            for _, V in SIZES[scale]:
                yield of_logits(M, V, dtype)


def of_logits(M: int, V: int, dtype: torch.dtype) -> Case:
    def eager(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets)  # as autocast does it

    def ligers(logits: Tensor, targets: Tensor) -> Tensor:
        from liger_kernel.transformers import functional

        return functional.liger_cross_entropy(logits, targets)

    def exact(logits: Tensor, targets: Tensor) -> Tensor:
        pieces = zip(logits.split(PIECE), targets.split(PIECE), strict=True)
        losses = [checkpoint(cross_entropy_reference, *piece, reduction="sum", use_reentrant=False) for piece in pieces]
        return torch.stack(losses).sum() / (targets != IGNORED).sum()

    return Case(
        kernel="cross_entropy",
        shape={"M": M, "V": V},
        direction="both",
        dtype=dtype,
        inputs=lambda device: {
            "logits": normal(M, V, device=device, dtype=dtype),
            "targets": _labels(M, V, device),
        },
        providers=peers(cross_entropy, eager, **liger(liger=ligers)),
        torchs=eager,
        exact=exact,
        work=roofs.cross_entropy_bytes(M, V, dtype.itemsize),
        roof=("copy",),
        codegen=("cross_entropy/",),
    )


def linear_cross_entropies(scale: str) -> Iterator[Case]:
    for dtype in DTYPES[scale]:
        for M in TOKENS[scale]:
            for N, V in SIZES[scale]:
                yield of_hidden(M, N, V, dtype)


def of_hidden(M: int, N: int, V: int, dtype: torch.dtype) -> Case:
    def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def torchs_fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, targets)

    def ligers(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from liger_kernel.transformers import functional

        return functional.liger_fused_linear_cross_entropy(hidden, weight, targets)

    def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses = [
            checkpoint(linear_cross_entropy_reference, h, weight, y, reduction="sum", use_reentrant=False)
            for h, y in zip(hidden.split(PIECE), targets.split(PIECE), strict=True)
        ]
        return torch.stack(losses).sum() / (targets != IGNORED).sum()

    fused = {"F_linear_cross_entropy": torchs_fused} if hasattr(F, "linear_cross_entropy") else {}
    return Case(
        kernel="linear_cross_entropy",
        shape={"M": M, "N": N, "V": V},
        direction="both",
        dtype=dtype,
        inputs=lambda device: {
            "hidden": normal(M, N, device=device, dtype=dtype),
            "weight": normal(V, N, device=device, dtype=dtype, scale=N**-0.5),
            "targets": _labels(M, V, device),
        },
        providers=peers(linear_cross_entropy, eager, **fused, **liger(liger=ligers)),
        torchs=eager,
        exact=exact,
        work=roofs.linear_cross_entropy_flops(M, N, V),
        roof=("matmul", M, V, N),
        codegen=("cross_entropy/",),
    )
