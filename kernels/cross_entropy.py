"""Cross-entropy of logits against labels, with the gradient written in the pass that computes the loss.

For one row of logits x [V] with label y, smoothing e and z-loss weight w:

    z    = c · tanh(x / c)  with softcap c, else x
    lse  = log Σ_v exp(z_v)
    loss = (1 − e) · (lse − z_y)  +  e/V · Σ_v (lse − z_v)  +  w · lse²

The gradient by hand: ∂lse/∂z_v = exp(z_v − lse) = p_v, the softmax. Both lse terms of the first two summands add up
to one lse, so

    ∂loss/∂z_v = p_v · (1 + 2·w·lse)  −  (1 − e)·[v = y]  −  e/V
    ∂z_v/∂x_v  = 1 − tanh²(x_v / c) = 1 − (z_v / c)²

Everything in it is known once lse is, so the kernel goes over a row twice: first for m = max z and
s = Σ exp(z − m), each lane of 8 columns with s rescaled whenever its own m grows (the online softmax; Milakov &
Gimelshein 2018, arXiv:1805.02867), then once more to write the gradient. The second reading comes mostly from the L2
cache, so a step costs one read and one write of the logits, where autograd's chain of operators makes six passes and
more.

M rows (tokens), V classes (vocabulary), y labels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ._labels import checked
from ._launch import POINTERS, AotCase, architecture, as_rows, jit, runs_triton, shipped, tl, tuned
from ._scale_rows import row_stride, scale_rows_aot_cases, scaled
from ._softcap import tanh


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The definition, in at least fp32; in fp64 it is what the tests trust. See `cross_entropy`."""
    targets = checked(logits.shape, logits.dtype, targets, ignore_index, label_smoothing, softcap, reduction)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = F.log_softmax(z, dim=-1)
    counts = targets != ignore_index
    y = torch.where(counts, targets, 0).to(torch.int64)
    loss = -(1 - label_smoothing) * log_p.gather(1, y[:, None])[:, 0]
    if label_smoothing:  # guarded, as 0 · −inf of an excluded class would be NaN
        loss = loss - label_smoothing * log_p.mean(-1)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(z, dim=-1).square()
    loss = torch.where(counts, loss, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum().clamp(min=1)


@jit
def _logits(at, inside, softcap, SOFTCAP: tl.constexpr):
    """z at these places in fp32, −inf where there are none."""
    if SOFTCAP:
        x = tl.load(at, inside, other=0.0).to(tl.float32)
        z = tl.where(inside, softcap * tanh(x * (1.0 / softcap)), -float("inf"))
    else:
        z = tl.load(at, inside, other=-float("inf")).to(tl.float32)
    return z


@jit
def _cross_entropy(
    x_ptr, grad_ptr,  # [M, V] logits and their gradient, which may be the same: a block is read before it is written
    target_ptr, weight_ptr, loss_ptr,  # [M] integers, [M] fp32 or one number with stride 0, [M] fp32
    x_stride, grad_stride, target_stride, weight_stride, V, ignore_index, smoothing, z_loss, softcap,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634  # GPUs have an instruction for powers of 2
    LANE: tl.constexpr = 8  # neighbours that a thread reads at once in 16 bits, so that a lane lies within a thread
    lanes, within = tl.arange(0, BLOCK // LANE)[:, None] * LANE, tl.arange(0, LANE)[None, :]
    row = tl.program_id(0).to(tl.int64)  # row * V overflows int32 from 2^31 logits on
    x_ptr += row * x_stride
    y = tl.load(target_ptr + row * target_stride).to(tl.int64)
    counts = y != ignore_index
    known = counts & (y >= 0) & (y < V)
    # Read here, not after the loop: the barriers that follow keep this ahead of the stores, which may overwrite x.
    z_y = tl.where(known, _logits(x_ptr + y, known, softcap, SOFTCAP), 0.0)

    # Each lane has a maximum and a sum of its own: joining them in every block would make all threads wait there.
    m = tl.full([BLOCK // LANE], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK // LANE], tl.float32)
    total = tl.zeros([BLOCK // LANE], tl.float32)
    for start in range(0, tl.where(counts, V, 0), BLOCK):
        col = start + lanes + within
        z = _logits(x_ptr + col, col < V, softcap, SOFTCAP)
        if SMOOTHING:
            total += tl.sum(tl.where(col < V, z, 0.0), 1)
        m_new = tl.maximum(m, tl.max(z, 1))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)  # a lane of nothing but −inf: −inf − −inf is NaN
        s = s * tl.exp2((m - shift) * LOG2E) + tl.sum(tl.exp2((z - shift[:, None]) * LOG2E), 1)
        m = m_new
    highest = tl.max(m)
    s = tl.sum(s * tl.exp2((m - tl.where(highest == -float("inf"), 0.0, highest)) * LOG2E))

    # An ignored row has read nothing: no −inf, no log 0.
    m, s = tl.where(counts, highest, 0.0), tl.where(counts, s, 1.0)
    lse = m + tl.log(s)
    loss = tl.log(s) + (m - z_y)  # lse − z_y, without rounding lse first
    if SMOOTHING:
        loss = (1.0 - smoothing) * loss + smoothing * (tl.log(s) + (m - tl.sum(total) / V))
    slope = 1.0
    if Z_LOSS:
        loss += z_loss * lse * lse
        slope = 1.0 + 2.0 * z_loss * lse
    # A label outside [0, V) makes its row NaN: a GPU cannot raise, and a wrong number would go unnoticed.
    weight = tl.where(known, tl.load(weight_ptr + row * weight_stride), float("nan"))
    tl.store(loss_ptr + row, tl.where(counts, loss * weight, 0.0))

    if GRADIENT:
        grad_ptr += row * grad_stride
        weight = tl.where(counts, weight, 0.0)
        off = smoothing / V * weight
        on, share = off + (1.0 - smoothing) * weight, slope / s * weight
        label = tl.where(known, y, -1).to(tl.int32)
        for start in range(0, V, BLOCK):
            col = start + lanes + within
            inside = (col < V) & counts
            z = _logits(x_ptr + col, inside, softcap, SOFTCAP)
            g = tl.exp2((z - m) * LOG2E) * share - tl.where(col == label, on, off)
            if SOFTCAP:
                ratio = tl.where(inside, z, 0.0) * (1.0 / softcap)  # 0 · ∞ would be NaN
                g *= 1.0 - ratio * ratio
            tl.store(grad_ptr + col, g, col < V)


def launch(
    logits: Tensor, targets: Tensor, weight: Tensor, losses: Tensor, grad: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> None:  # fmt: skip
    """Fill losses [M] fp32 and, unless None, grad [M, V] (`logits` itself is allowed) from logits [M, V].

    weight, fp32, [M] or [1], multiplies each row's loss and gradient. Rows of logits and grad are contiguous in V.
    """
    M, V = logits.shape
    out = losses if grad is None else grad  # some pointer is needed; without GRADIENT it is not used
    assert logits.stride(1) == 1 and (grad is None or grad.stride(1) == 1)
    _cross_entropy[(M,)](
        logits, out, targets, weight, losses,
        logits.stride(0), out.stride(0), targets.stride(0), row_stride(weight, M), V,
        ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0),
        SOFTCAP=softcap is not None, SMOOTHING=label_smoothing != 0, Z_LOSS=z_loss != 0, GRADIENT=grad is not None,
        **tuned("cross_entropy", architecture(logits.device), _shape_class(V), logits.dtype),
    )  # fmt: skip


@custom_op("minillm::cross_entropy", mutates_args=())
def _op(
    logits: Tensor, targets: Tensor, weight: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, summed: bool, gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logits [M, V], targets [M], weight [M] or [1] fp32 -> losses [M] or their sum, gradient [M, V] or [0]."""
    losses, grad = _outputs(logits, gradient)
    out = grad if gradient else None
    launch(as_rows(logits), targets, weight, losses, out, ignore_index, label_smoothing, z_loss, softcap)
    return losses.sum() if summed else losses, grad


def _outputs(logits: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    M, V = logits.shape
    return logits.new_empty(M, dtype=torch.float32), logits.new_empty((M, V) if gradient else (0,))


@_op.register_fake
def _fake(logits, targets, weight, ignore_index, label_smoothing, z_loss, softcap, summed, gradient):
    losses, grad = _outputs(logits, gradient)
    return losses.new_empty(()) if summed else losses, grad


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros [M, V] as the upstream gradient of the gradient
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx, upstream: Tensor | None, _: None):
    if torch.is_grad_enabled():  # create_graph=True: what follows would count as constant, silently
        raise RuntimeError("cross_entropy on Triton has no second derivative: use cross_entropy_reference")
    if upstream is None:
        return (None,) * 9
    return scaled(*ctx.saved_tensors, upstream), *[None] * 8


_op.register_autograd(_backward, setup_context=_setup_context)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of logits [M, V] against targets [M] (any integer dtype), in nats: fp32, [] or [M] for "none".

    label_smoothing  e: a share e of the target is spread over all V classes (Szegedy et al. 2016, arXiv:1512.00567),
                     as in `F.cross_entropy`
    z_loss           adds z_loss · lse² for each label that counts (ST-MoE, arXiv:2202.08906, equation 5)
    softcap          c: the loss is that of c · tanh(logits / c), lse included
    reduction        "none", "sum", or "mean" over the labels other than ignore_index; none counting gives 0

    The gradient is computed here when the logits need one, into memory of its own, of the logits' size and dtype.
    Raises ValueError for shapes, dtypes or options that make no sense and, on a CPU, for a label outside [0, V);
    on a GPU such a label makes the loss NaN. fp64 logits take the reference.
    """
    options = (label_smoothing, z_loss, softcap)
    if not runs_triton(logits, targets):
        names = dict(zip(("label_smoothing", "z_loss", "softcap"), options, strict=True))
        return cross_entropy_reference(logits, targets, ignore_index=ignore_index, reduction=reduction, **names)
    targets = checked(logits.shape, logits.dtype, targets, ignore_index, label_smoothing, softcap, reduction)
    gradient = torch.is_grad_enabled() and logits.requires_grad
    weight = torch.ones(1, device=logits.device)
    if reduction != "mean":
        return _op(logits, targets, weight, ignore_index, *options, reduction == "sum", gradient)[0]
    count = (targets != ignore_index).sum().clamp(min=1)
    if logits.dtype == torch.float16:  # a gradient already divided by the count would underflow before loss scaling
        return _op(logits, targets, weight, ignore_index, *options, True, gradient)[0] / count
    return _op(logits, targets, weight / count, ignore_index, *options, True, gradient)[0]


def _shape_class(V: int) -> str:
    """v1024, v4096: the row fits into one block of that size; large: it takes several."""
    return next((f"v{size}" for size in (1024, 4096) if size >= V), "large")


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Every shipped configuration, with all options on and off: registers depend on them."""
    for key, choice in shipped("cross_entropy", arch).items():
        for options in (False, True):
            yield _aot_case(key, dict(choice), options)
    yield from scale_rows_aot_cases(arch)


def _aot_case(key: str, choice: dict[str, int], options: bool) -> AotCase:
    pointer = POINTERS[key.split("/")[1]]
    flags = dict.fromkeys(("SOFTCAP", "SMOOTHING", "Z_LOSS"), options) | {
        "GRADIENT": True,
        "BLOCK": choice.pop("BLOCK"),
    }
    names = ("x_ptr", "grad_ptr", "target_ptr", "weight_ptr", "loss_ptr")
    strides = ("x_stride", "grad_stride", "target_stride", "weight_stride")
    numbers = {"V": "i32:16", "ignore_index": "i32", "smoothing": "fp32", "z_loss": "fp32", "softcap": "fp32"}
    signature = {
        **dict(zip(names, (pointer, pointer, "*i64:16", "*fp32:16", "*fp32:16"), strict=True)),
        **dict(zip(strides, ("i32:16", "i32:16", "i32", "i32"), strict=True)),
        **numbers,
        **dict.fromkeys(flags, "constexpr"),
    }
    return AotCase(f"cross_entropy/{key}/{'options' if options else 'plain'}", _cross_entropy, signature, flags, choice)
