"""A gradient that the forward pass has finished, times what the backward pass brings: one number, or one for each row.

M rows, V columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.library import custom_op

from ._launch import POINTERS, AotCase, architecture, jit, shipped, tl, triton, tuned


@jit
def _scale_rows(x_ptr, factor_ptr, factor_stride, V, blocks, BLOCK: tl.constexpr):
    """One program: a block of one row. Where the factor is 1, which is what backward() sends, x is not even read."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    col = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr + row * factor_stride)
    inside = col < tl.where(factor == 1.0, 0, V)
    x = tl.load(x_ptr + row * V + col, inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * V + col, x * factor, inside)


@custom_op("minillm::scale_rows_", mutates_args=("x",))
def scale_rows(x: Tensor, factor: Tensor) -> None:
    """x [M, V] contiguous *= factor, fp32, one per row [M] or one for all []."""
    M, V = x.shape if factor.ndim else (1, x.numel())  # one factor for all: the rows are one
    choice = tuned("scale_rows", architecture(x.device), "any", x.dtype)
    blocks = triton.cdiv(V, choice["BLOCK"])
    _scale_rows[(M * blocks,)](x, factor, row_stride(factor, M), V, blocks, **choice)


def row_stride(x: Tensor, M: int) -> int:
    """Stride that walks x [M], or stays on its one element."""
    return x.stride(0) if x.ndim and x.shape[0] == M else 0


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """A saved gradient [M, N] times factor, fp32 [M] or []; for use in a backward pass alone.

    The saved tensor is nobody else's, so it is scaled where it lies; not while tracing, nor where the graph is kept
    for another backward pass, which needs it as it was.
    """
    if type(grad) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph():
        scale_rows(grad, factor)
        return grad
    return (grad * factor.reshape(-1, 1)).to(grad.dtype)


def scale_rows_aot_cases(arch: str) -> Iterator[AotCase]:
    """Every shipped configuration."""
    for key, choice in shipped("scale_rows", arch).items():
        pointer, numbers = POINTERS[key.split("/")[1]], {"factor_stride": "i32", "V": "i32:16", "blocks": "i32"}
        signature = {"x_ptr": pointer, "factor_ptr": "*fp32:16", **numbers, "BLOCK": "constexpr"}
        options = {name: value for name, value in choice.items() if name != "BLOCK"}
        yield AotCase(f"scale_rows/{key}", _scale_rows, signature, {"BLOCK": choice["BLOCK"]}, options)
