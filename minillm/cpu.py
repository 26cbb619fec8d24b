"""Where PyTorch's operators leave a CPU waiting for memory: the same results in an order that suits its caches.

The loss of 4,096 tokens over 4,096 classes makes four passes over 64 MB of logits and their gradient. In chunks of a
few hundred tokens they stay in the cache: the loss of a chunk, its gradient with respect to the logits and the three
matrix products follow one another, and no [tokens, vocab] matrix exists. (On a GPU kernels/linear_cross_entropy.py does
the same; there the point is memory.)

M tokens, N features, V classes, C tokens of a chunk. With z the softcapped logits, s = logsumexp(z), y the target:

    loss = s − (1 − ε) z_y − ε/V Σ z + ζ s²          ε label smoothing, ζ z-loss
    ∂loss/∂z = softmax(z) (1 + 2 ζ s) − (1 − ε) 1_y − ε/V,   and through z = c·tanh(x/c):  ∂z/∂x = 1 − (z/c)²

A step of generation is some hundred operators, most of which take longer to call than to run: RoPE takes queries and
keys as one there. It multiplies every weight with few rows. MKL does such a product in one thread, and on AMD's
processors far below the memory's rate; a batch of two products, half of the weights each, is done in both threads, and
faster in each ([1, 768] · [768, 50257] in fp32 on two cores of a Zen 5: 3.6 to 5.6 ms against 9.7; eight rows: 11
against 17).

In bf16, attention of many queries over few keys is two matrix products and a softmax: these run in bf16 instructions,
which SDPA's CPU kernel does not use for its own products (forward and backward of 4,096 tokens, 4 heads of 64, one core
of a Zen 5: at 256 keys 18 ms against 54, at 512 28 against 46, at 1,024 56 against 58). For a single query SDPA in fp32
over a cache in fp32 is the fastest, which is therefore what inference/reader.py makes (4 heads of 64 over 64 keys: 9 µs
against 26 of SDPA in bf16 and 49 of the products; 32 such rows: 124 against 750 and 320).
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**21
"""Logits held at once: 8 MB in fp32, about what two cores have of a shared cache; of a large vocabulary more, N rows at
least, since each chunk adds to the gradient of the weight [V, N]: that pass must not outweigh those over the logits."""

FEW_ROWS, FEWEST_ROWS = 32, 4
"""Rows up to which `linear` is the faster way, in several threads and in one; up to the second number the weights are
its left factor."""

FEW_ELEMENTS = 2**17
"""Of the queries up to which `rope` is the faster way: calling operators then costs more than passing over memory."""

PLAIN_ATTENTION = 512**2
"""Most scores of a head for which writing them out beats SDPA; also what bounds the memory that they take."""


def attends_plainly(q: Tensor, k: Tensor) -> bool:
    """Whether `attention` is the faster way for q [B, H, T, D], k [B, H, S, D]."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] * k.shape[2] <= PLAIN_ATTENTION


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √D + bias) v for q [B, H, T, D], k, v [B, H, S, D] in bf16 -> [B, H, T, D].

    Scores and probabilities are rounded to bf16, sums are in fp32: the error against fp64 is 1.7 to 1.9 times that of
    SDPA in bf16.

    Args:
        bias: broadcast to [B, H, T, S], -inf where a query sees no key; no row may be all -inf.
    """
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.mT)
    if bias is not None:
        scores = scores + bias
    return torch.matmul(torch.softmax(scores, -1), v)


def rotates_few(q: Tensor) -> bool:
    """Whether `rope` is the faster way for q [B, H, T, D]: few tokens, and no gradient."""
    return (
        q.device.type == "cpu"
        and q.numel() <= FEW_ELEMENTS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`ops.rope` of q [B, H, T, D] and k [B, G, T, D] as one tensor; cos, sin [T, D/2] or [B, 1, T, D/2].

    QK-norm and rotation are rounded to the dtype of q once, at the end.
    """
    (H, D), G = q.shape[1::2], k.shape[1]
    x = torch.cat((q, k), 1)  # [B, H + G, T, D]
    if norms is not None:
        weight = torch.cat((norms[0].expand(H, 1, D), norms[1].expand(G, 1, D)))
        x = torch.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), (D,), None, eps) * weight
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    x = torch.addcmul(x * cos, x.roll(D // 2, -1), sin).type_as(q)
    return x[:, :H], x[:, H:]


def multiplies_few(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is the faster way for x [..., K] and weight [N, K]: few rows in fp32, and no gradient."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and len(weight) > 1
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkl.is_available()
        # Last, since the number of threads is nothing that torch.compile could trace.
        and 0 < x.numel() <= (FEW_ROWS if torch.get_num_threads() > 1 else FEWEST_ROWS) * x.shape[-1]
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias for x [..., K], weight [N, K], bias [N] -> [..., N], in two halves of the weights."""
    rows, (N, K) = x.reshape(-1, x.shape[-1]), weight.shape
    half, M = N // 2, len(rows)
    halves = weight[: 2 * half].view(2, half, K)
    if M <= FEWEST_ROWS:
        y = torch.bmm(halves, rows.t().expand(2, K, M)).view(2 * half, M).t()
    else:
        y = torch.bmm(rows.expand(2, M, K), halves.mT).transpose(0, 1).reshape(M, 2 * half)
    if N % 2:
        y = torch.cat((y, rows @ weight[-1:].t()), 1)
    y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], N)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are finished in the forward pass, as the logits are there; backward multiplies them by one number."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, ignore_index, label_smoothing, z_loss, softcap):
        V, dtype = weight.shape[0], hidden.dtype
        total = hidden.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        wants = any(ctx.needs_input_grad[:3])
        d_hidden = torch.empty_like(hidden) if wants else None
        d_weight = torch.zeros_like(weight, dtype=total.dtype) if wants else None
        d_bias = torch.zeros_like(bias, dtype=total.dtype) if wants and bias is not None else None
        size = max(CHUNK_ELEMENTS // V, weight.shape[1])
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            h, counts = hidden[rows], targets[rows] != ignore_index
            y = torch.where(counts, targets[rows], 0).unsqueeze(1)
            z = torch.nn.functional.linear(h, weight, bias).to(total.dtype)
            if softcap is not None:
                z = softcap * torch.tanh(z / softcap)
            lse = z.logsumexp(-1, keepdim=True)
            loss = lse - (1 - label_smoothing) * z.gather(1, y) + z_loss * lse.square()
            if label_smoothing:
                loss -= label_smoothing / V * z.sum(-1, keepdim=True)
            total += (loss.squeeze(1) * counts).sum()
            if not wants:
                continue
            slope = 1 - (z / softcap).square() if softcap is not None else None
            g = z.sub_(lse).exp_()
            if z_loss:
                g *= 1 + 2 * z_loss * lse
            g.scatter_add_(1, y, torch.full_like(lse, label_smoothing - 1))
            if label_smoothing:
                g -= label_smoothing / V
            if slope is not None:
                g *= slope
            g *= counts.unsqueeze(1)
            narrow = g.to(dtype)
            torch.mm(narrow, weight, out=d_hidden[rows])
            d_weight += narrow.t() @ h
            if d_bias is not None:
                d_bias += g.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx, upstream):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        d_bias = None if d_bias is None else (d_bias * upstream).to(ctx.dtypes[1])
        return d_hidden * upstream, (d_weight * upstream).to(ctx.dtypes[0]), d_bias, None, None, None, None, None


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
) -> Tensor:
    """Sum of the losses over the rows of hidden [M, N] whose target counts, in at least fp32; weight [V, N], bias [V].

    Takes part in autocast as a linear layer does: the products run in its dtype, softmax and sums in fp32. First
    derivatives only.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast("cpu", enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, ignore_index, label_smoothing, z_loss, softcap)
