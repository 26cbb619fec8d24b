"""Task heads: a Transformer's states become scores for labels, tags, spans or a number.

    classify, regress    the state of one place, or their mean: dropout, linear   [B, L]
                         BERT's pooler: tanh(dense(first state)), dropout, linear
    tag                  the state of every place: dropout, linear                [B, T, L]
    span-qa              the same with two outputs, where an answer starts and where it ends   [B, T, 2]

B rows, T tokens, L labels (1 for regression), dim the stream's width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.config.strict import require
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
    bias: bool = True
    dropout: float = 0.1

    def __post_init__(self) -> None:
        require(self.outputs >= 1, f"task.head.outputs must be at least 1, not {self.outputs}")
        require(0 <= self.dropout < 1, f"task.head.dropout must be in [0, 1), not {self.dropout}")


def pooled_head(outputs: int, config: ModelConfig, pool: str | None) -> HeadConfig:
    """A head that reads a whole text.

    Args:
        pool: mean, cls, last, or pooler (the first state, a dense layer, tanh). None: the last state of a decoder, the
            mean of the others. A decoder's last state gets no bias, as in Transformers' classifiers.
    """
    pool = pool or ("last" if config.shape == "decoder" else "mean")
    plain = config.shape == "decoder" and pool == "last"
    state: Any = "cls" if pool == "pooler" else pool
    return HeadConfig(outputs=outputs, pool=state, pooler=pool == "pooler", bias=not plain)


def first(states: Tensor, real: Tensor) -> Tensor:
    """[B, dim] the first place that is no padding, as BERT's [CLS]."""
    return states[torch.arange(len(states), device=states.device), real.int().argmax(1)]


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

    Args:
        pooler: weight [dim, dim] and bias [dim] of a pooler that came with the Transformer. None: a new one is drawn,
            where the head has one.

    `threshold` [L] travels with the weights: what a label's probability, or an answer's lead over no answer, must reach
    to be given. Tuned on validation data; NaN: never tuned.
    """

    def __init__(self, transformer: Transformer, config: HeadConfig, pooler: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.transformer, self.config, self.head_config = transformer, transformer.config, config
        dim = transformer.config.dim
        self.pool = POOLS[config.pool] if config.pool else None
        self.pooler = nn.Linear(dim, dim) if config.pooler else None
        self.dropout = nn.Dropout(config.dropout)
        self.task_head = nn.Linear(dim, config.outputs, bias=config.bias)
        self.register_buffer("threshold", torch.full((config.outputs,), torch.nan))
        nn.init.normal_(self.task_head.weight, std=transformer.config.init_std)
        if config.bias:
            nn.init.zeros_(self.task_head.bias)
        if self.pooler is not None:
            nn.init.normal_(self.pooler.weight, std=transformer.config.init_std)
            nn.init.zeros_(self.pooler.bias)
            if pooler is not None:
                self.pooler.load_state_dict(dict(pooler))

    @property
    def added(self) -> tuple[str, ...]:
        """Names of the modules around the Transformer: every method trains them."""
        return ("task_head",) if self.pooler is None else ("pooler", "task_head")

    def forward(self, ids: Tensor, *, segments: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """ids [B, T] -> [B, L], or [B, T, L] where nothing is pooled; the others as for `Transformer.states`."""
        if self.config.shape == "encoder-decoder":
            states = self.transformer.encode(ids, segments)
        else:
            states = self.transformer.states(ids, segments=segments, token_types=token_types)
        if self.pool is not None:
            real = torch.ones_like(ids, dtype=torch.bool) if segments is None else segments >= 0
            states = self.pool(states, real)
        if self.pooler is not None:
            states = torch.tanh(self.pooler(states))
        return self.task_head(self.dropout(states))
