"""Task heads: a Transformer's states become scores for labels, tags, spans or a number.

    classify, regress    the state of one place, or their mean: dropout, linear   [B, L]
    tag                  the state of every place: dropout, linear                [B, T, L]
    span-qa              the same with two outputs, where an answer starts and where it ends   [B, T, 2]

B rows, T tokens, L labels (1 for regression), dim the stream's width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minillm.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A task's head."""

    outputs: int
    """Labels, or 1 for a number, or 2 for the ends of a span."""
    pool: Literal["cls", "last", "mean"] | None = None
    """Which states are read; None: every place has outputs of its own."""
    pooler: bool = False
    """A dense layer and tanh before the head (BERT)."""
    dropout: float = 0.1


def first(states: Tensor, real: Tensor) -> Tensor:
    """[B, dim] the first place, as BERT's [CLS]."""
    return states[:, 0]


def last(states: Tensor, real: Tensor) -> Tensor:
    """[B, dim] the last place that is no padding: the only one from which a decoder has seen all."""
    places = torch.arange(states.shape[1], device=states.device)
    return states[torch.arange(len(states), device=states.device), torch.where(real, places, 0).amax(1)]


def mean(states: Tensor, real: Tensor) -> Tensor:
    """[B, dim] the mean over places that are no padding."""
    weight = real.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


POOLS = {"cls": first, "last": last, "mean": mean}


class TaskModel(nn.Module):
    """A Transformer and the head of one task, under the names `transformer` and `task_head`.

    With `config.pooler` a dense layer and tanh stand between the pooled state and the head, as in BERT. Of an
    encoder-decoder the encoder alone is read.

    `threshold` [L] travels with the weights: what a label's probability, or an answer's lead over no answer, must reach
    to be given. Tuned on validation data; NaN: never tuned.
    """

    def __init__(self, transformer: Transformer, config: HeadConfig):
        super().__init__()
        self.transformer, self.config, self.head_config = transformer, transformer.config, config
        dim = transformer.config.dim
        self.pool = POOLS[config.pool] if config.pool else None
        self.pooler = nn.Linear(dim, dim) if config.pooler else None
        self.dropout = nn.Dropout(config.dropout)
        self.task_head = nn.Linear(dim, config.outputs)
        self.register_buffer("threshold", torch.full((config.outputs,), torch.nan))
        nn.init.normal_(self.task_head.weight, std=transformer.config.init_std)
        nn.init.zeros_(self.task_head.bias)
        if self.pooler is not None:
            nn.init.normal_(self.pooler.weight, std=transformer.config.init_std)
            nn.init.zeros_(self.pooler.bias)

    def forward(self, ids: Tensor, *, segments: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """ids [B, T] -> [B, L], or [B, T, L] where nothing is pooled; the others as for `Transformer.states`."""
        states = self.transformer.states(ids, segments=segments, token_types=token_types)
        if self.pool is not None:
            real = torch.ones_like(ids, dtype=torch.bool) if segments is None else segments >= 0
            states = self.pool(states, real)
        if self.pooler is not None:
            states = torch.tanh(self.pooler(states))
        return self.task_head(self.dropout(states))
