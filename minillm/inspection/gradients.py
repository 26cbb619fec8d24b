"""Gradients from block to block, and what becomes of them without the residual connections.

    as it is         x + f(x)              a gradient passes the block, and goes through it too
    blocks alone     x, not passed on      the same values, but gradients go through every block and past none
    removed          f(x)                  the same weights with nothing added at all, forward or backward

Gradients through many branches shrink with their number: those that train the first blocks came past the others (Veit
et al. 2016, https://arxiv.org/abs/1605.06431; He et al. 2016, https://arxiv.org/abs/1603.05027). With nothing added the
norms keep up the size of the stream and of its gradients, but not what it says: attention averages its tokens until
they are one (Dong et al. 2021, https://arxiv.org/abs/2103.03404). B rows, T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minillm.inspection.depths import Record, recorded
from minillm.inspection.reading import Reading, losses, stacks_of
from minillm.model.transformer import Stack, Transformer


@dataclass(frozen=True)
class Flow:
    """Of one stack, norms of the gradient of the mean loss (in nats), and the stream itself."""

    streams: Tensor
    """[layers + 1] fp64, at the stream before the first block and after each (Glorot and Bengio 2010; pre- and
    post-norm: Xiong et al. 2020, arXiv:2002.04745)."""
    weights: Tensor
    """[layers] fp64, of each block's weights."""
    likeness: Tensor
    """[layers + 1] mean cosine of two tokens of the stream there; 1: they say all the same."""


def gradient_flow(model: Transformer, read: Reading) -> dict[str, Flow]:
    """The flow in each stack. Every parameter of the model must require gradients; their `.grad` stays as it is."""
    stacks = stacks_of(model)
    with torch.enable_grad(), recorded(stacks.values()) as records:
        loss = losses(model, read).mean()
    streams = [stream for record in records for stream in _streams(record)]
    blocks = [list(block.parameters()) for stack in stacks.values() for block in stack.blocks]
    weights = [weight for block in blocks for weight in block]
    gradients = iter(torch.autograd.grad(loss, [*streams, *weights], materialize_grads=True))
    # In fp64, since the squares of what has nearly vanished would be 0.
    at_streams = iter([next(gradients).double().norm() for _ in streams])
    of_blocks = iter([torch.stack([next(gradients).double().norm() for _ in block]).norm() for block in blocks])
    return {
        name: Flow(
            torch.stack([next(at_streams) for _ in record.depths]),
            torch.stack([next(of_blocks) for _ in stack.blocks]),
            torch.stack([_likeness(sum(state)) for state in record.depths]),  # type: ignore[arg-type]
        )
        for (name, stack), record in zip(stacks.items(), records, strict=True)
    }


def _streams(record: Record) -> list[Tensor]:
    """Pre-norm, a block is given (new, stream) and adds them first, so the sum's gradient is that of `new`. That of
    `stream` is not: the MLP of the block before has read it too. The first block's `new` is a constant 0."""
    return [record.depths[0][-1], *(state[0] for state in record.depths[1:])]


@torch.no_grad()
def _likeness(x: Tensor) -> Tensor:
    """[B, T, dim] -> [] over all pairs of two tokens of a row; of one token 1."""
    T, unit = x.shape[1], torch.nn.functional.normalize(x.double(), dim=-1)
    if T == 1:
        return torch.ones((), dtype=torch.float64, device=x.device)
    return ((unit.sum(1).square().sum(-1) - T) / (T * (T - 1))).mean()


def blocks_alone(model: Transformer) -> AbstractContextManager[None]:
    """While open, gradients go through every branch and past none; all values are as they were."""
    return _changed(model, torch.detach)


def without_additions(model: Transformer) -> AbstractContextManager[None]:
    """While open, each branch hands on what it makes of the stream, and nothing is added to it."""
    return _changed(model, torch.zeros_like)


@contextmanager
def _changed(model: Transformer, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Every addition of a branch to the stream adds to `change(stream)`: a norm does it, of (new, stream)."""

    def before(_: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        new, stream = inputs
        return new, change(stream)

    norms = [norm for stack in stacks_of(model).values() for norm in _adding(stack)]
    handles = [norm.register_forward_pre_hook(before) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(stack: Stack) -> list[nn.Module]:
    """The norms that add a branch; a pre-norm stack's first one has none to add yet, and its last is the final one."""
    names = ("attention_norm", "cross_norm", "mlp_norm")
    norms = [getattr(block, name) for block in stack.blocks for name in names if getattr(block, name) is not None]
    return norms if stack.final_norm is None else [*norms[1:], stack.final_norm]
