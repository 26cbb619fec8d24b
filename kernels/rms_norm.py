"""RMSNorm:  y = n · w  with  n = x / rms,  rms = sqrt(mean(x²) + eps)  over the last dimension.

With a residual, x + r is formed, written and normalised in one pass (8 bytes an element in bf16 instead of 10).

Backward. With g = dy · w and 1/rms treated as the function of x that it is,
d(1/rms)/dx_j = −x_j / (N · rms³), so

    dx = (g − n · mean(g · n)) / rms  (+ the gradient that comes down the residual stream, added in the same pass)
    dw = Σ over rows of dy · n

dw is summed without atomics, so every run gives the same bits: P programs stay resident, program p takes rows
p, p + P, …, keeps its share of dw in registers, writes it once, and a sum over the P shares follows. Where a row
does not fit into registers (CHUNKS > 1) several programs share it, after a pass that gives mean(g · n) (`_row_means`).

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), eq. 4.
M rows (leading dimensions flattened), N features, P programs, BLOCK features and ROWS rows a program holds at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.library import custom_op

from ._launch import AotCase, architecture, as_rows, jit, runs_triton, tl, triton, tuned
from ._norm import check_norm, load_sum, norm_aot_cases, persistent_programs, width_class


def rms_norm_reference(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition: at least fp32 inside, the input's dtype outside; in fp64 it is what the tests trust."""
    check_norm(x, weight, None, residual)
    total = x if residual is None else x + residual
    wide = torch.promote_types(total.dtype, torch.float32)
    inv_rms = torch.rsqrt(total.to(wide).square().mean(-1, keepdim=True) + eps)
    y = (total.to(wide) * inv_rms * weight.to(wide)).to(total.dtype)
    return y if residual is None else (y, total)


@jit
def _forward(
    x_ptr, residual_ptr, w_ptr, y_ptr, total_ptr, inv_rms_ptr,  # [M, N] twice, [N], [M, N] twice, [M]
    stride_x, stride_residual, M, N, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # int64: row * N may pass 2^31
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        col = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < M) & (col < N)  # what lies outside adds 0 to the sum
        x = load_sum(x_ptr, residual_ptr, stride_x, stride_residual, row, col, inside, HAS_RESIDUAL, dtype)
        squares += x * x
    inv_rms = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) * (1.0 / N) + eps)  # [ROWS, 1]
    # With one chunk the compiler inlines both loops and these loads become the registers of the first ones.
    for chunk in range(CHUNKS):
        col = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < M) & (col < N)
        x = load_sum(x_ptr, residual_ptr, stride_x, stride_residual, row, col, inside, HAS_RESIDUAL, dtype)
        w = tl.load(w_ptr + col, col < N, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            tl.store(total_ptr + row * N + col, x, inside)
        tl.store(y_ptr + row * N + col, x * inv_rms * w, inside)
    tl.store(inv_rms_ptr + row, inv_rms, row < M)  # fp32 even for bf16 x: backward needs it exact


@jit
def _row_means(
    dy_ptr, x_ptr, w_ptr, inv_rms_ptr, row_means_ptr, stride_dy, stride_x, N, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    inv_rms = tl.load(inv_rms_ptr + row)
    products = tl.zeros([BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        col = chunk * BLOCK + tl.arange(0, BLOCK)
        dy = tl.load(dy_ptr + row * stride_dy + col, col < N, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_x + col, col < N, other=0.0).to(tl.float32)
        products += dy * tl.load(w_ptr + col, col < N, other=0.0).to(tl.float32) * x * inv_rms
    tl.store(row_means_ptr + row, tl.sum(products) / N)


@jit
def _backward(
    dy_ptr, dtotal_ptr, x_ptr, w_ptr, inv_rms_ptr, row_means_ptr, dx_ptr, dw_ptr,  # dw [P, N] fp32, the others as above
    stride_dy, stride_dtotal, stride_x, M, N,
    HAS_DTOTAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    # Of the tile's own shape: a row alone would lie on other threads than dy and x, and the loop would run on both.
    col = tl.broadcast_to(tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :], ROWS, BLOCK)
    w = tl.load(w_ptr + col, col < N, other=0.0).to(tl.float32)
    inv_n = 1.0 / N
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(program * ROWS, M, programs * ROWS, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # the interpreter's loops count in int32
        inside = (row < M) & (col < N)
        dy = tl.load(dy_ptr + row * stride_dy + col, inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_x + col, inside, other=0.0).to(tl.float32)
        inv_rms = tl.load(inv_rms_ptr + row, row < M, other=0.0)
        n, g = x * inv_rms, dy * w
        mean = tl.sum(g * n, 1, keep_dims=True) * inv_n
        if CHUNKS > 1:  # this program has only a part of the row
            mean = tl.load(row_means_ptr + row, row < M, other=0.0)
        dx = inv_rms * (g - n * mean)
        if HAS_DTOTAL:
            dx += tl.load(dtotal_ptr + row * stride_dtotal + col, inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * N + col, dx, inside)
        dw += dy * n
    tl.store(dw_ptr + program * N + col, tl.sum(dw, 0, keep_dims=True), col < N)


def _empty_outputs(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    M, N = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = x.new_empty((0 if residual is None else M, N), dtype=dtype)  # an operator cannot return None, or its input
    return x.new_empty((M, N), dtype=dtype), total, x.new_empty(M, dtype=torch.float32)


@custom_op("minillm::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [M, N], weight [N]  ->  y [M, N], the sum [M, N] ([0, N] without residual), 1/rms [M] in fp32."""
    y, total, inv_rms = _empty_outputs(x, weight, residual, eps)
    (M, N), dtype = x.shape, y.dtype
    if M == 0:
        return y, total, inv_rms
    x, weight = as_rows(x), weight.contiguous()
    other = x if residual is None else as_rows(residual)
    choice = tuned("rms_norm_forward", architecture(x.device), width_class(N), dtype)
    _forward[(triton.cdiv(M, choice["ROWS"]),)](
        x, other, weight, y, total, inv_rms, x.stride(0), other.stride(0), M, N, eps,
        HAS_RESIDUAL=residual is not None, CHUNKS=triton.cdiv(N, choice["BLOCK"]), **choice,
    )  # fmt: skip
    return y, total, inv_rms


@custom_op("minillm::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, inv_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the sum, [M, N]  ->  of the sum [M, N] and of the weight [N] in fp32."""
    dx, dw = _empty_gradients(dy, dtotal, total, weight, inv_rms)
    M, N = total.shape
    if M == 0:
        return dx, dw.zero_()
    dy, total, weight = as_rows(dy), as_rows(total), weight.contiguous()
    other = dy if dtotal is None else as_rows(dtotal)
    choice = dict(tuned("rms_norm_backward", architecture(dy.device), width_class(N), total.dtype))
    chunks = triton.cdiv(N, choice["BLOCK"])
    programs = persistent_programs(M, choice["ROWS"], choice.pop("PER_MULTIPROCESSOR"), chunks, dy.device)
    shares = dw.new_empty((programs, N))
    row_means = inv_rms
    if chunks > 1:
        row_means = torch.empty_like(inv_rms)
        _row_means[(M,)](
            dy, total, weight, inv_rms, row_means, dy.stride(0), total.stride(0), N,
            BLOCK=choice["BLOCK"], CHUNKS=chunks, num_warps=choice["num_warps"],
        )  # fmt: skip
    _backward[(programs, chunks)](
        dy, other, total, weight, inv_rms, row_means, dx, shares,
        dy.stride(0), other.stride(0), total.stride(0), M, N,
        HAS_DTOTAL=dtotal is not None, CHUNKS=chunks, **choice,
    )  # fmt: skip
    return dx, shares.sum(0)


def _empty_gradients(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, inv_rms: Tensor
) -> tuple[Tensor, Tensor]:
    M, N = total.shape
    return total.new_empty((M, N)), total.new_empty(N, dtype=torch.float32)


def _save(ctx, inputs, output):
    x, weight, residual, _ = inputs
    _, total, inv_rms = output
    ctx.save_for_backward(x if residual is None else total, weight, inv_rms)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)  # an output that nobody used costs no zeros


def _gradient(ctx, dy, dtotal, _):
    total, weight, inv_rms = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    if residual_dtype is None:
        dtotal = None  # of the empty stand-in
    dx, dw = dtotal, None
    if dy is not None:
        dx, dw = _rms_norm_backward(dy, dtotal, total, weight, inv_rms)
        dw = dw.to(weight.dtype)
    if dx is None:
        return None, None, None, None
    return dx.to(x_dtype), dw, None if residual_dtype is None else dx.to(residual_dtype), None


_rms_norm.register_fake(_empty_outputs)  # shapes alone, so torch.compile and export can trace through
_rms_norm_backward.register_fake(_empty_gradients)
_rms_norm.register_autograd(_gradient, setup_context=_save)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of x [..., N] by weight [N]: fused where Triton runs, the reference elsewhere.

    With `residual` [..., N] it returns (norm(x + residual), x + residual), both from one pass; they have the dtype
    that x + residual has. Without it the answer has x's dtype. Statistics are fp32 and weight may have any float
    dtype. Any strides are right; features that do not lie side by side are copied first.

    Raises ValueError where weight or residual do not fit x, or x has no features.
    Source: Zhang and Sennrich (2019); eps inside the root, as in Llama.
    """
    check_norm(x, weight, None, residual)
    if not runs_triton(*(t for t in (x, weight, residual) if t is not None)):
        return rms_norm_reference(x, weight, eps=eps, residual=residual)
    N = x.shape[-1]
    y, total, _ = _rms_norm(x.reshape(-1, N), weight, None if residual is None else residual.reshape(-1, N), eps)
    return y.view(x.shape) if residual is None else (y.view(x.shape), total.view(x.shape))


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Every shipped configuration, forward and backward, with the residual (which needs the most registers)."""
    yield from norm_aot_cases("rms_norm_forward", _forward, arch, HAS_RESIDUAL=True)
    yield from norm_aot_cases("rms_norm_backward", _backward, arch, HAS_DTOTAL=True)
    for case in norm_aot_cases("rms_norm_backward", _row_means, arch):
        if case.constexprs["CHUNKS"] > 1:
            yield case._replace(name=case.name.replace("backward", "row_means"))
