"""The stream between the blocks of a stack: recorded as it passes, and read on from any depth.

A pre-norm block is given (new, stream), the last addition still to be made and all before it; a post-norm one (x,).
B rows, T tokens, N scored tokens, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minillm.inspection.reading import Reading, predicted, stacks_of
from minillm.model.attention import View
from minillm.model.transformer import Stack, Transformer

State = tuple[Tensor, ...]


@dataclass
class Record:
    """One pass through a stack."""

    depths: list[State] = field(default_factory=list)
    """What each block is given, and behind these what the last one hands on."""
    view: View = field(default_factory=View)
    """What all blocks may see besides."""


@contextmanager
def recorded(stacks: Iterable[Stack]) -> Iterator[list[Record]]:
    """While open, what passes through each of the stacks is put into its record."""
    records: list[Record] = []
    handles: list[RemovableHandle] = []

    def watch(stack: Stack, record: Record) -> None:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            record.depths.append(inputs[:-1])
            record.view = inputs[-1]

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            record.depths.append(_state(output))

        handles.extend(block.register_forward_pre_hook(before) for block in stack.blocks)
        handles.append(stack.blocks[-1].register_forward_hook(after))

    for stack in stacks:
        records.append(Record())
        watch(stack, records[-1])
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def onward(stack: Stack, depth: int, state: State, view: View) -> Tensor:
    """From what the block at `depth` is given to the stack's output [B, T, dim]."""
    for block in stack.blocks[depth:]:
        state = _state(block(*state, view))
    return state[0] if stack.final_norm is None else stack.final_norm(*state)[0]


def _state(output: Any) -> State:
    return output if isinstance(output, tuple) else (output,)


@torch.no_grad()
def logit_lens(model: Transformer, read: Reading) -> Iterator[Tensor]:
    """[N, V] what the last norm and the output matrix make of the stream before the first block, then after each
    (nostalgebraist 2020, "interpreting GPT: the logit lens"); the last are the model's own logits."""
    *_, stack = stacks_of(model).values()
    with recorded([stack]) as (record,):
        model.states(read.ids, source=read.source)
    for state in record.depths:
        yield predicted(model, onward(stack, len(stack.blocks), state, record.view), read)
