"""What LayerNorm and RMSNorm share around their kernels: argument checks, rows, width classes, shipped cases.

M rows (all leading dimensions flattened), N features, P programs in a launch grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._launch import POINTERS, AotCase, jit, multiprocessors, shipped, tl, triton

NARROWEST, WIDEST = 128, 32768  # the first class holds all narrower rows too, the last one all wider ones
FP32_POINTERS = {"w_ptr", "b_ptr", "mean_ptr", "inv_std_ptr", "inv_rms_ptr", "row_means_ptr", "dw_ptr", "db_ptr"}


def check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Raise ValueError, naming the argument, unless the shapes and dtypes make one norm over the last dimension."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x {list(x.shape)} has no features to normalise: its last dimension must be at least 1")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape [{x.shape[-1]}], as x's last dimension, not {list(tensor.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {list(residual.shape)} must have x's shape {list(x.shape)}: expand it first")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}, which no norm takes: convert it to a float first")


@jit
def load_sum(
    x_ptr, residual_ptr, stride_x, stride_residual, row, col, inside, HAS_RESIDUAL: tl.constexpr, dtype: tl.constexpr
):
    """x, or x + residual rounded to `dtype`, at [row, col] in fp32; 0 where not `inside`."""
    x = tl.load(x_ptr + row * stride_x + col, inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * stride_residual + col, inside, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)  # backward is given the rounded sum, so forward must normalise that one
    return x


def width_class(features: int) -> str:
    """The tuned tables' word for rows of that many features: 'n1024' holds 513 to 1024."""
    return f"n{min(max(NARROWEST, triton.next_power_of_2(features)), WIDEST)}"


def persistent_programs(rows: int, per_step: int, per_multiprocessor: int, chunks: int, device: torch.device) -> int:
    """P, so many that the whole grid [P, chunks] is resident at once, and no more than there are steps."""
    side_by_side = multiprocessors(device) * per_multiprocessor // chunks
    return max(1, min(side_by_side, triton.cdiv(rows, per_step)))


def norm_aot_cases(kernel: str, function: Any, arch: str, **flags: bool) -> Iterator[AotCase]:
    """One case for each row of a norm's table; `flags` are the constexprs that the table does not choose.

    Scalars are typed as the launcher sees them for usual widths: strides and N are multiples of 16, M is any number.
    Weight and bias are fp32 beside rows of any dtype, as in training under autocast.
    """
    for key, choice in shipped(kernel, arch).items():
        shape, dtype = key.split("/")
        constexprs = {**choice, **flags, "CHUNKS": triton.cdiv(int(shape[1:]), choice["BLOCK"])}
        signature = {
            name: "constexpr" if name in constexprs
            else POINTERS["float32" if name in FP32_POINTERS else dtype] if name.endswith("_ptr")
            else {"M": "i32", "eps": "fp32"}.get(name, "i32:16")
            for name in function.arg_names
        }  # fmt: skip
        options = {name: choice[name] for name in ("num_warps", "num_stages") if name in choice}
        constexprs = {name: value for name, value in constexprs.items() if name in function.arg_names}
        yield AotCase(f"{kernel}/{key}", function, signature, constexprs, options)
