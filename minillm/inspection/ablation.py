"""The loss without each head (Michel et al. 2019, https://arxiv.org/abs/1905.10650).

What stands before the head is as it was, so each pass begins at the head's own block, and the heads of a block go
through the rest of the model together, as rows of one batch. n heads at once, B rows, T tokens, N scored tokens,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.inspection.attention import places
from minillm.inspection.depths import Record, State, onward, recorded
from minillm.inspection.reading import Reading, losses, predicted, stacks_of
from minillm.model.attention import View
from minillm.model.transformer import Stack, Transformer

AT_ONCE = 2**24
"""Numbers that the heads of one batch may take up, of logits and of the MLP's inside: 64 MiB. More gain nothing."""


@torch.no_grad()
def head_ablation(model: Transformer, read: Reading) -> dict[str, Tensor]:
    """Name of an attention -> [layers, H] the mean loss with a head's output set to 0 less the loss as it is, nats."""
    stacks = stacks_of(model)
    with recorded(stacks.values()) as found:
        whole = losses(model, read).mean()
    records = dict(zip(stacks, found, strict=True))

    def without(stack: Stack, part: str) -> Tensor:
        return torch.stack([_block(model, read, records, stack, depth, part) for depth in range(len(stack.blocks))])

    return {name: without(stack, part) - whole for name, (stack, part) in places(model).items()}


def _block(
    model: Transformer, read: Reading, records: dict[str, Record], stack: Stack, depth: int, part: str
) -> Tensor:
    """[H] mean losses, each without one head of the attention `part` of a block."""
    H, config, found = model.config.heads, model.config, []
    layer = stack.blocks[depth].get_submodule(f"{part}.out_proj")
    N = len(read.scored)
    size = read.ids.numel() * 4 * config.dim + N * len(model.output_weight)
    most = max(1, AT_ONCE // size)
    for heads in (range(first, min(first + most, H)) for first in range(0, H, most)):
        with silenced(layer, heads, config.head_width):
            states = _from(model, records, stack, depth, len(heads))
        logits = predicted(model, states.unflatten(0, (len(heads), -1)), read)  # [n, N, V]
        nats = F.cross_entropy(logits.flatten(0, 1), read.targets.repeat(len(heads)), reduction="none")
        found.append(nats.view(-1, N).mean(1))
    return torch.cat(found)


def _from(model: Transformer, records: dict[str, Record], stack: Stack, depth: int, n: int) -> Tensor:
    """[n * B, T, dim] the last stack's output, for n times what a block of `stack` was given."""
    record, decoder = records["encoder" if stack is model.encoder else "decoder"], model.decoder
    states = onward(stack, depth, _times(record.depths[depth], n), _wide(record.view, n))
    if stack is decoder or decoder is None:
        return states
    record = records["decoder"]  # which has not been told of the change yet
    return onward(decoder, 0, _times(record.depths[0], n), replace(record.view, memory=states))


def _times(state: State, n: int) -> State:
    return tuple(x.repeat(n, 1, 1) for x in state)


def _wide(view: View, n: int) -> View:
    return view if view.memory is None else replace(view, memory=view.memory.repeat(n, 1, 1))


@contextmanager
def silenced(layer: nn.Module, heads: Sequence[int], width: int) -> Iterator[None]:
    """While open, `layer` reads zeros for the head heads[i] in the i-th of the equal parts of its rows."""

    def silence(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0].unflatten(-1, (-1, width)).unflatten(0, (len(heads), -1)).clone()  # [n, B, T, H, D]
        for part, head in zip(x, heads, strict=True):
            part[..., head, :] = 0
        return (x.flatten(-2).flatten(0, 1),)

    handle = layer.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()
