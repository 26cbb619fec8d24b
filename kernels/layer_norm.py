"""LayerNorm:  y = n · w + b  with  n = (x − mean) / std,  std = sqrt(mean((x − mean)²) + eps)  over the last dimension.

With a residual, x + r is formed, written and normalised in one pass. The variance is that of the centred values:
mean(x²) − mean² would lose every digit where the mean is large beside the deviation.

Backward. With g = dy · w, and mean and std treated as the functions of x that they are,

    dx = (g − mean(g) − n · mean(g · n)) / std  (+ the gradient that comes down the residual stream, in the same pass)
    dw = Σ over rows of dy · n,   db = Σ over rows of dy

mean(g) is what the centring takes away again, n · mean(g · n) what the division does. dw and db are summed without
atomics, so every run gives the same bits: P programs stay resident, program p takes rows p, p + P, …, keeps its share
in registers, writes it once, and a sum over the P shares follows. Where a row does not fit into registers (CHUNKS > 1)
several programs share it, after a pass that gives the two means (`_row_means`).

Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), eq. 4.
M rows (leading dimensions flattened), N features, P programs, BLOCK features and ROWS rows a program holds at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.library import custom_op

from ._launch import AotCase, architecture, as_rows, jit, runs_triton, tl, triton, tuned
from ._norm import check_norm, load_sum, norm_aot_cases, persistent_programs, width_class


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition: at least fp32 inside, the input's dtype outside; in fp64 it is what the tests trust."""
    check_norm(x, weight, bias, residual)
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    y = (y if bias is None else y + bias.to(wide.dtype)).to(total.dtype)
    return y if residual is None else (y, total)


@jit
def _forward(
    x_ptr, residual_ptr, w_ptr, b_ptr, y_ptr, total_ptr, mean_ptr, inv_std_ptr,  # [M, N] twice, [N] twice, …, [M] twice
    stride_x, stride_residual, M, N, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # int64: row * N may pass 2^31
    # With one chunk the compiler inlines all three loops, and x is loaded once and stays in registers.
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        col = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < M) & (col < N)
        sums += load_sum(x_ptr, residual_ptr, stride_x, stride_residual, row, col, inside, HAS_RESIDUAL, dtype)
    mean = tl.sum(sums, 1, keep_dims=True) / N  # [ROWS, 1]; divided, so that equal numbers have exactly their mean
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        col = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < M) & (col < N)
        x = load_sum(x_ptr, residual_ptr, stride_x, stride_residual, row, col, inside, HAS_RESIDUAL, dtype)
        centred = tl.where(inside, x - mean, 0.0)  # padding was 0, and 0 - mean would count
        squares += centred * centred
    inv_std = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) * (1.0 / N) + eps)  # [ROWS, 1]
    for chunk in range(CHUNKS):
        col = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < M) & (col < N)
        x = load_sum(x_ptr, residual_ptr, stride_x, stride_residual, row, col, inside, HAS_RESIDUAL, dtype)
        y = (x - mean) * inv_std * tl.load(w_ptr + col, col < N, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(b_ptr + col, col < N, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            tl.store(total_ptr + row * N + col, x, inside)
        tl.store(y_ptr + row * N + col, y, inside)
    tl.store(mean_ptr + row, mean, row < M)  # fp32 even for bf16 x: backward needs them exact
    tl.store(inv_std_ptr + row, inv_std, row < M)


@jit
def _row_means(
    dy_ptr, x_ptr, w_ptr, mean_ptr, inv_std_ptr, row_means_ptr,  # row_means [2, M]: of g and of g · n
    stride_dy, stride_x, M, N, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mean, inv_std = tl.load(mean_ptr + row), tl.load(inv_std_ptr + row)
    gradients, products = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        col = chunk * BLOCK + tl.arange(0, BLOCK)
        dy = tl.load(dy_ptr + row * stride_dy + col, col < N, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_x + col, col < N, other=0.0).to(tl.float32)
        g = dy * tl.load(w_ptr + col, col < N, other=0.0).to(tl.float32)
        gradients += g
        products += g * (x - mean) * inv_std
    tl.store(row_means_ptr + row, tl.sum(gradients) / N)
    tl.store(row_means_ptr + M + row, tl.sum(products) / N)


@jit
def _backward(
    dy_ptr, dtotal_ptr, x_ptr, w_ptr, mean_ptr, inv_std_ptr, row_means_ptr,
    dx_ptr, dw_ptr, db_ptr,  # dw, db [P, N] fp32
    stride_dy, stride_dtotal, stride_x, M, N,
    HAS_DTOTAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    # Of the tile's own shape: a row alone would lie on other threads than dy and x, and the loop would run on both.
    col = tl.broadcast_to(tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :], ROWS, BLOCK)
    w = tl.load(w_ptr + col, col < N, other=0.0).to(tl.float32)
    inv_n = 1.0 / N
    dw, db = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(program * ROWS, M, programs * ROWS, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # the interpreter's loops count in int32
        inside = (row < M) & (col < N)
        dy = tl.load(dy_ptr + row * stride_dy + col, inside, other=0.0).to(tl.float32)  # where it is 0, so are g and dw
        x = tl.load(x_ptr + row * stride_x + col, inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, row < M, other=0.0)
        inv_std = tl.load(inv_std_ptr + row, row < M, other=0.0)
        n, g = (x - mean) * inv_std, dy * w
        mean_g, mean_gn = tl.sum(g, 1, keep_dims=True) * inv_n, tl.sum(g * n, 1, keep_dims=True) * inv_n
        if CHUNKS > 1:  # this program has only a part of the row
            mean_g = tl.load(row_means_ptr + row, row < M, other=0.0)
            mean_gn = tl.load(row_means_ptr + M + row, row < M, other=0.0)
        dx = inv_std * (g - mean_g - n * mean_gn)
        if HAS_DTOTAL:
            dx += tl.load(dtotal_ptr + row * stride_dtotal + col, inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * N + col, dx, inside)
        dw += dy * n
        if HAS_BIAS:
            db += dy
    tl.store(dw_ptr + program * N + col, tl.sum(dw, 0, keep_dims=True), col < N)
    if HAS_BIAS:
        tl.store(db_ptr + program * N + col, tl.sum(db, 0, keep_dims=True), col < N)


def _empty_outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, N = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = x.new_empty((0 if residual is None else M, N), dtype=dtype)  # an operator cannot return None, or its input
    y, mean, inv_std = x.new_empty((M, N), dtype=dtype), *(x.new_empty(M, dtype=torch.float32) for _ in range(2))
    return y, total, mean, inv_std


@custom_op("minillm::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual [M, N], weight, bias [N]  ->  y [M, N], the sum [M, N] ([0, N] without residual), mean, 1/std [M]."""
    y, total, mean, inv_std = _empty_outputs(x, weight, bias, residual, eps)
    (M, N), dtype = x.shape, y.dtype
    if M == 0:
        return y, total, mean, inv_std
    x, weight = as_rows(x), weight.contiguous()
    b, other = weight if bias is None else bias.contiguous(), x if residual is None else as_rows(residual)
    choice = tuned("layer_norm_forward", architecture(x.device), width_class(N), dtype)
    _forward[(triton.cdiv(M, choice["ROWS"]),)](
        x, other, weight, b, y, total, mean, inv_std, x.stride(0), other.stride(0), M, N, eps,
        HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, CHUNKS=triton.cdiv(N, choice["BLOCK"]), **choice,
    )  # fmt: skip
    return y, total, mean, inv_std


@custom_op("minillm::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, inv_std: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the sum, [M, N]  ->  of the sum [M, N], and of weight (and bias) [1 or 2, N] in fp32."""
    dx, sums = _empty_gradients(dy, dtotal, total, weight, mean, inv_std, has_bias)
    M, N = total.shape
    if M == 0:
        return dx, sums.zero_()
    dy, total, weight = as_rows(dy), as_rows(total), weight.contiguous()
    other = dy if dtotal is None else as_rows(dtotal)
    choice = dict(tuned("layer_norm_backward", architecture(dy.device), width_class(N), total.dtype))
    chunks = triton.cdiv(N, choice["BLOCK"])
    programs = persistent_programs(M, choice["ROWS"], choice.pop("PER_MULTIPROCESSOR"), chunks, dy.device)
    shares = sums.new_empty((len(sums), programs, N))
    row_means = mean
    if chunks > 1:
        row_means = mean.new_empty((2, M))
        _row_means[(M,)](
            dy, total, weight, mean, inv_std, row_means, dy.stride(0), total.stride(0), M, N,
            BLOCK=choice["BLOCK"], CHUNKS=chunks, num_warps=choice["num_warps"],
        )  # fmt: skip
    _backward[(programs, chunks)](
        dy, other, total, weight, mean, inv_std, row_means, dx, shares[0], shares[-1],
        dy.stride(0), other.stride(0), total.stride(0), M, N,
        HAS_DTOTAL=dtotal is not None, HAS_BIAS=has_bias, CHUNKS=chunks, **choice,
    )  # fmt: skip
    return dx, shares.sum(1)


def _empty_gradients(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, inv_std: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    M, N = total.shape
    return total.new_empty((M, N)), total.new_empty((2 if has_bias else 1, N), dtype=torch.float32)


def _save(ctx, inputs, output):
    x, weight, bias, residual, _ = inputs
    _, total, mean, inv_std = output
    ctx.save_for_backward(x if residual is None else total, weight, mean, inv_std)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, bias, residual)]
    ctx.set_materialize_grads(False)  # an output that nobody used costs no zeros


def _gradient(ctx, dy, dtotal, *_):
    total, weight, mean, inv_std = ctx.saved_tensors
    x_dtype, bias_dtype, residual_dtype = ctx.dtypes
    if residual_dtype is None:
        dtotal = None  # of the empty stand-in
    dx, dw, db = dtotal, None, None
    if dy is not None:
        dx, sums = _layer_norm_backward(dy, dtotal, total, weight, mean, inv_std, bias_dtype is not None)
        dw, db = sums[0].to(weight.dtype), None if bias_dtype is None else sums[1].to(bias_dtype)
    if dx is None:
        return None, None, None, None, None
    return dx.to(x_dtype), dw, db, None if residual_dtype is None else dx.to(residual_dtype), None


_layer_norm.register_fake(_empty_outputs)  # shapes alone, so torch.compile and export can trace through
_layer_norm_backward.register_fake(_empty_gradients)
_layer_norm.register_autograd(_gradient, setup_context=_save)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of x [..., N] by weight [N] and bias [N]: fused where Triton runs, the reference elsewhere.

    With `residual` [..., N] it returns (norm(x + residual), x + residual), both from one pass; they have the dtype
    that x + residual has. Without it the answer has x's dtype. Statistics are fp32; weight and bias may have any
    float dtype. Any strides are right; features that do not lie side by side are copied first.

    Raises ValueError where weight, bias or residual do not fit x, or x has no features.
    Source: Ba, Kiros and Hinton (2016), eq. 4; eps as in torch.nn.functional.layer_norm.
    """
    check_norm(x, weight, bias, residual)
    if not runs_triton(*(t for t in (x, weight, bias, residual) if t is not None)):
        return layer_norm_reference(x, weight, bias, eps=eps, residual=residual)
    N = x.shape[-1]
    y, total, *_ = _layer_norm(
        x.reshape(-1, N), weight, bias, None if residual is None else residual.reshape(-1, N), eps
    )
    return y.view(x.shape) if residual is None else (y.view(x.shape), total.view(x.shape))


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Every shipped configuration, forward and backward, with bias and residual (which need the most registers)."""
    yield from norm_aot_cases("layer_norm_forward", _forward, arch, HAS_RESIDUAL=True, HAS_BIAS=True)
    yield from norm_aot_cases("layer_norm_backward", _backward, arch, HAS_DTOTAL=True, HAS_BIAS=True)
    for case in norm_aot_cases("layer_norm_backward", _row_means, arch):
        if case.constexprs["CHUNKS"] > 1:
            yield case._replace(name=case.name.replace("backward", "row_means"))
