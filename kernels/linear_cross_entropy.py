"""From hidden states straight to the loss, without ever holding the logits of all tokens.

    logits = hidden · weightᵀ + bias,   loss = cross_entropy(logits, targets)

At 32k tokens and 128k classes the logits alone take 8 GB in bf16, and their gradient as much again. Both are needed
for a few thousand tokens at a time only: with g = ∂loss/∂logits, which `kernels.cross_entropy` writes over the logits
of a chunk of tokens c,

    ∂hidden[c] = g · weight        ∂weight += gᵀ · hidden[c]        ∂bias += Σ_rows g

So the forward pass walks over chunks with one buffer, does the three matrix products of each (cuBLAS; there is no
point in competing with it) and keeps the finished gradients; the backward pass multiplies them by the upstream
gradient, one number. ∂weight and ∂bias are summed in fp32 whatever the dtype, as many chunks add up in them.
With reduction="none" every row has an upstream gradient of its own, which reaches ∂weight only inside the sum: then
the forward pass computes losses alone and the backward pass walks over the chunks with those numbers as row weights.
The idea of differentiating chunk by chunk in the forward pass: Liger Kernel, arXiv:2410.10989, section 3.2.

The chunk. Each one reads and writes ∂weight once, 8·V·N bytes beside 6·C·V·N operations: on a chip with 780 TFLOP/s
and 4.3 TB/s that is 242/C of the time of the products, 3 % at C = 8192, 12 % at 2048. So C is 8192 tokens, fewer
where the buffer would pass 2^29 elements (1 GiB in bf16; V above 65k), and never more than half of all tokens.

M tokens, N features, V classes, C tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ._labels import checked
from ._launch import runs_triton
from ._scale_rows import scaled
from .cross_entropy import cross_entropy_reference, launch

CHUNK_TOKENS, CHUNK_ELEMENTS = 8192, 2**29


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The definition: the logits in memory, in at least fp32; in fp64 it is what the tests trust."""
    _check_linear(hidden, weight, bias)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return cross_entropy_reference(
        logits,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
    )


def chunk_rows(M: int, V: int) -> int:
    """Tokens whose logits are held at once; see the top of the file."""
    return max(1, min(CHUNK_TOKENS, CHUNK_ELEMENTS // V, (M + 1) // 2))


@custom_op("minillm::linear_cross_entropy", mutates_args=())
def _op(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, row_weight: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, summed: bool, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses [M], or their sum [], and the gradients of the sum: hidden's [M, N], weight's [V, N], bias's [V].

    row_weight, fp32 [M] or [1], multiplies each row. `wanted` says which of the three are computed (the others come
    back empty); weight's and bias's are fp32.
    """
    (M, V), options = (hidden.shape[0], weight.shape[0]), (ignore_index, label_smoothing, z_loss, softcap)
    losses, d_hidden, d_weight, d_bias = _outputs(hidden, weight, wanted)
    size, wide = chunk_rows(M, V), -(-V // 64) * 64
    buffer = hidden.new_empty(size, wide)[:, :V]  # rows start on aligned addresses, whatever V: loads of 16 bytes
    with torch.autocast(hidden.device.type, enabled=False):  # these products are in the dtypes they were given
        for start in range(0, M, size):
            rows = slice(start, start + size)
            h, labels = hidden[rows], targets[rows]
            logits = buffer[: len(h)]
            torch.mm(h, weight.t(), out=logits) if bias is None else torch.addmm(bias, h, weight.t(), out=logits)
            scale = row_weight if len(row_weight) != M else row_weight[rows]
            launch(logits, labels, scale, losses[rows], logits if any(wanted) else None, *options)
            if wanted[0]:
                torch.mm(logits, weight, out=d_hidden[rows])
            if wanted[1]:
                _add_product(d_weight, logits.t(), h)
            if wanted[2]:
                d_bias += logits.sum(0, dtype=torch.float32)
    return losses.sum() if summed else losses, d_hidden, d_weight, d_bias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b in fp32: cuBLAS takes 16-bit factors for it; elsewhere they are widened first."""
    if a.dtype != torch.float32 and a.is_cuda and not torch.version.hip:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _outputs(hidden: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (M, N), V = hidden.shape, weight.shape[0]
    fp32 = {"dtype": torch.float32}
    return (
        hidden.new_empty(M, **fp32),
        hidden.new_empty((M, N) if wanted[0] else (0, 0)),
        weight.new_zeros((V, N) if wanted[1] else (0, 0), **fp32),
        weight.new_zeros(V if wanted[2] else 0, **fp32),
    )


@_op.register_fake
def _fake(
    hidden, weight, targets, bias, row_weight, ignore_index, label_smoothing, z_loss, softcap, summed, wanted
):  # fmt: skip
    losses, *gradients = _outputs(hidden, weight, wanted)
    return losses.new_empty(()) if summed else losses, *gradients


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, _, *ctx.options, ctx.summed, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(*(output[1:] if ctx.summed else (hidden, weight, targets, bias)))


def _backward(ctx, upstream: Tensor | None, *_: None):
    if torch.is_grad_enabled():  # create_graph=True: what follows would count as constant, silently
        raise RuntimeError(
            "linear_cross_entropy on Triton has no second derivative: use linear_cross_entropy_reference"
        )
    if upstream is None:
        return (None,) * 11
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    if ctx.summed:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        d_hidden = scaled(d_hidden, upstream) if wanted[0] else None
        d_weight = scaled(d_weight, upstream) if wanted[1] else None
        d_bias = d_bias * upstream
    else:
        _, d_hidden, d_weight, d_bias = _op(*ctx.saved_tensors, upstream.contiguous(), *ctx.options, True, wanted)
    return (
        d_hidden if wanted[0] else None,
        d_weight.to(ctx.weight_dtype) if wanted[1] else None,
        None,
        d_bias.to(ctx.bias_dtype) if wanted[2] else None,
        *[None] * 7,
    )


_op.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy` of hidden [M, N] · weightᵀ [N, V] + bias [V] against targets [M], in nats: fp32, [] or [M].

    The options are those of `cross_entropy`. hidden, weight and bias have one dtype, which is also that of the logits
    of a chunk; under autocast they are cast as `F.linear` casts them. Gradients: hidden, weight and bias, computed in
    the forward pass where they are needed (in the backward pass for reduction="none").
    Memory beyond the gradients: one chunk of logits, and ∂weight in fp32.
    Raises ValueError for shapes, dtypes or options that make no sense and, on a CPU, for a label outside [0, V);
    on a GPU such a label makes the loss NaN. fp64 takes the reference.
    """
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not runs_triton(hidden, weight, targets):
        return linear_cross_entropy_reference(
            hidden,
            weight,
            targets,
            bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
        )
    _check_linear(hidden, weight, bias)
    shape = (len(hidden), weight.shape[0])
    targets = checked(shape, hidden.dtype, targets, ignore_index, label_smoothing, softcap, reduction)
    summed = reduction != "none"
    tensors = (hidden, weight, bias)
    wanted = [summed and torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    ones = torch.ones(1, device=hidden.device)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    loss = _op(hidden, weight, targets, bias, ones, *options, summed, wanted)[0]
    # Divided here and not in the rows: their gradients in fp16 would underflow when divided by the count.
    return loss / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss


def _check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError where the linear layer's tensors do not fit together."""
    shapes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}"
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(f"linear cross-entropy wants hidden [M, N] and weight [V, N]; it got {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear cross-entropy wants a bias [V] = [{weight.shape[0]}], not {list(bias.shape)}")
    dtypes = {t.dtype for t in (hidden, weight, bias) if t is not None}
    if len(dtypes) > 1:
        raise ValueError(
            f"hidden, weight and bias must have one dtype, not {sorted(map(str, dtypes))}: cast them first"
        )
