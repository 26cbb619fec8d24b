"""One text as a model is scored on it: what is read, and which states predict which tokens.

A decoder is scored on each token after the first, that of an encoder-decoder too: its encoder reads a source. An
encoder is scored on each token hidden behind the mask in turn, a row each (Salazar et al. 2020,
https://arxiv.org/abs/1910.14659). Losses are in nats. B rows, T tokens, S source tokens, N scored tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.config import UserError
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
    source: Tensor | None = None
    """[1, S] what the encoder of an encoder-decoder reads; the text is its decoder's."""

    @property
    def targets(self) -> Tensor:
        """[N]"""
        return self.text[0, self.scored]


def stacks_of(model: Transformer) -> dict[str, Stack]:
    """The model's stacks by their names, in the order in which they read; the states of the last one predict."""
    both = {"encoder": model.encoder, "decoder": model.decoder}
    return {name: stack for name, stack in both.items() if stack is not None}


def reading(
    model: Transformer,
    ids: Sequence[int],
    frame: tuple[Sequence[int], Sequence[int]],
    mask: int | None,
    source: Sequence[int] | None = None,
) -> Reading:
    """The text `ids` between the two of `frame`, which are read and not scored.

    Args:
        mask: id of an encoder's mask token; a decoder needs none.
        source: of an encoder-decoder all that its encoder reads.

    Raises:
        UserError: the model is of a kind that is not inspected, or there is nothing to score.
    """
    assert (source is not None) == (len(stacks_of(model)) == 2)
    if any(stack.front.length for stack in stacks_of(model).values()):
        raise UserError("a model with a prefix or a soft prompt in front cannot be inspected; take its base")
    before, behind = frame
    device = model.embedding.weight.device
    text = torch.tensor([[*before, *ids, *behind]], device=device)
    first, end = len(before), len(before) + len(ids)
    scored = torch.arange(max(first, 1) if model.decoder is not None else first, end, device=device)
    if not len(scored):
        raise UserError("no token of the text can be scored; give a longer text, or more --max-tokens")
    if model.decoder is not None:
        read = None if source is None else torch.tensor([list(source)], device=device)
        return Reading(text, text, torch.zeros_like(scored), scored - 1, scored, read)
    if mask is None:
        raise UserError("an encoder is scored on masked tokens, and this one's tokenizer has no mask")
    rows = torch.arange(len(scored), device=device)
    masked = text.repeat(len(scored), 1)
    masked[rows, scored] = mask
    return Reading(text, masked, rows, scored, scored)


def predicted(model: Transformer, states: Tensor, read: Reading) -> Tensor:
    """states [..., B, T, dim] after the last norm -> logits [..., N, V] fp32"""
    return model.head(states[..., read.rows, read.places, :], model.output_weight).float()


def losses(model: Transformer, read: Reading) -> Tensor:
    """[N] nats"""
    states = model.states(read.ids, source=read.source)
    return F.cross_entropy(predicted(model, states, read), read.targets, reduction="none")
