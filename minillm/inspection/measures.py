"""The loss of one text, and what of the model it hangs on: its depths, its heads, its weights.

A decoder is scored on each token after the first. An encoder is scored on each token hidden behind the mask in turn,
a row each (Salazar et al. 2020, https://arxiv.org/abs/1910.14659). Losses are in bits a token, gradients those of the
mean loss in nats, which training descends. B rows, T tokens, N scored tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import UserError
from minillm.inspection.attention import attention_maps, stack_of
from minillm.model.transformer import Stack, Transformer


@dataclass(frozen=True)
class Reading:
    """One text as a model is scored on it."""

    text: Tensor
    """[1, T]"""
    ids: Tensor
    """[B, T] what is read: of a decoder the text, of an encoder a copy for each scored token, that one masked."""
    rows: Tensor
    """[N]"""
    places: Tensor
    """[N]: the states at (row, place) predict."""
    scored: Tensor
    """[N] places in the text of what they predict."""

    @property
    def targets(self) -> Tensor:
        """[N]"""
        return self.text[0, self.scored]


def reading(
    model: Transformer, ids: Sequence[int], frame: tuple[Sequence[int], Sequence[int]], mask: int | None
) -> Reading:
    """The text `ids` between the two of `frame`, which are read and not scored.

    Args:
        mask: id of an encoder's mask token; a decoder needs none.

    Raises:
        UserError: the model is of a kind that is not inspected, or there is nothing to score.
    """
    if model.config.shape == "encoder-decoder":
        raise UserError("an encoder-decoder cannot be inspected; take a decoder or an encoder")
    if stack_of(model).front.length:
        raise UserError("a model with a prefix or a soft prompt in front cannot be inspected; take its base")
    before, behind = frame
    text = torch.tensor([[*before, *ids, *behind]], device=model.embedding.weight.device)
    first, end = len(before), len(before) + len(ids)
    scored = torch.arange(max(first, 1) if model.decoder is not None else first, end, device=text.device)
    if not len(scored):
        raise UserError("no token of the text can be scored; give a longer text, or more --max-tokens")
    if model.decoder is not None:
        return Reading(text, text, torch.zeros_like(scored), scored - 1, scored)
    if mask is None:
        raise UserError("an encoder is scored on masked tokens, and this one's tokenizer has no mask")
    rows = torch.arange(len(scored), device=text.device)
    masked = text.repeat(len(scored), 1)
    masked[rows, scored] = mask
    return Reading(text, masked, rows, scored, scored)


def predicted(model: Transformer, states: Tensor, read: Reading) -> Tensor:
    """states [B, T, dim] after the last norm -> logits [N, V] fp32"""
    return model.head(states[read.rows, read.places], model.output_weight).float()


def losses(model: Transformer, read: Reading) -> Tensor:
    """[N] nats"""
    return F.cross_entropy(predicted(model, model.states(read.ids), read), read.targets, reduction="none")


@contextmanager
def recorded(stack: Stack) -> Iterator[list[tuple[Tensor, ...]]]:
    """What each block is given, and behind these what the last one hands on: (new, stream), or (x,) post-norm."""
    found: list[tuple[Tensor, ...]] = []

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(inputs[:-1])

    def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        found.append(output if isinstance(output, tuple) else (output,))

    handles = [block.register_forward_pre_hook(before) for block in stack.blocks]
    handles.append(stack.blocks[-1].register_forward_hook(after))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logit_lens(model: Transformer, read: Reading) -> Iterator[Tensor]:
    """[N, V] what the last norm and the output matrix make of the stream before the first block, then after each
    (nostalgebraist 2020, "interpreting GPT: the logit lens"); the last are the model's own logits."""
    stack = stack_of(model)
    with recorded(stack) as depths:
        model.states(read.ids)
    for depth in depths:
        yield predicted(model, depth[0] if stack.final_norm is None else stack.final_norm(*depth)[0], read)


@torch.no_grad()
def head_ablation(model: Transformer, read: Reading) -> Tensor:
    """[layers, H] the mean loss with a head's output set to 0 less the loss as it is, in nats (Michel et al. 2019,
    https://arxiv.org/abs/1905.10650)."""
    whole, D = losses(model, read).mean(), model.config.head_width
    changes = []
    for block in stack_of(model).blocks:
        for head in range(model.config.heads):
            with silenced(block.get_submodule("attention.out_proj"), slice(head * D, (head + 1) * D)):
                changes.append(losses(model, read).mean() - whole)
    return torch.stack(changes).view(-1, model.config.heads)


@contextmanager
def silenced(layer: nn.Module, features: slice) -> Iterator[None]:
    """While open, `layer` reads zeros in these features of its input."""

    def silence(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0].clone()
        x[..., features] = 0
        return (x,)

    handle = layer.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def gradient_flow(model: Transformer, read: Reading) -> tuple[Tensor, Tensor]:
    """Norms of the mean loss's gradient: [layers + 1] at the stream before the first block and after each, [layers] of
    each block's weights (Glorot and Bengio 2010; pre- and post-norm: Xiong et al. 2020, arXiv:2002.04745).

    Every parameter of the model must require gradients; their `.grad` stays as it is.
    """
    stack = stack_of(model)
    with torch.enable_grad(), recorded(stack) as depths:
        loss = losses(model, read).mean()
    # Pre-norm, a block is given (new, stream) and adds them first, so the sum's gradient is that of `new`. That of
    # `stream` is not: the MLP of the block before has read it too. The first block's `new` is a constant 0.
    streams = [depths[0][-1], *(depth[0] for depth in depths[1:])]
    blocks = [list(block.parameters()) for block in stack.blocks]
    weights = [weight for block in blocks for weight in block]
    gradients = iter(torch.autograd.grad(loss, [*streams, *weights], materialize_grads=True))
    at_streams = [next(gradients).norm() for _ in streams]
    of_blocks = [torch.stack([next(gradients).norm() for _ in block]).norm() for block in blocks]
    return torch.stack(at_streams), torch.stack(of_blocks)


def inspect(model: Transformer, read: Reading, name: Callable[[int], str]) -> dict[str, Any]:
    """All of it as plain values, for a page or for a program; `name` gives a token's text.

    Raises `UserError` where the loss is not finite.
    """
    bit = math.log(2)
    whole = losses(model, read).detach()
    if not bool(whole.isfinite().all()):
        raise UserError("the model's loss on this text is not finite: its weights are broken; take another checkpoint")
    lens = []
    for logits in logit_lens(model, read):  # one depth at a time: [N, V] of them all would be gigabytes
        best, likeliest = logits.softmax(-1).max(-1)
        lens.append(
            {
                "mean_bits": float(F.cross_entropy(logits, read.targets) / bit),
                "ids": likeliest.tolist(),
                "tokens": [name(i) for i in likeliest.tolist()],
                "probabilities": best.tolist(),
            }
        )
    at_streams, of_blocks = gradient_flow(model, read)
    return {
        "shape": model.config.shape,
        "ids": read.text[0].tolist(),
        "tokens": [name(i) for i in read.text[0].tolist()],
        "scored": read.scored.tolist(),
        "bits": (whole / bit).tolist(),
        "mean_bits": float(whole.mean() / bit),
        "attention": attention_maps(model, read.text).tolist(),
        "lens": lens,
        "ablation_bits": (head_ablation(model, read) / bit).tolist(),
        "gradient_norms": {"streams": at_streams.tolist(), "weights": of_blocks.tolist()},
    }
