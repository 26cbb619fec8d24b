"""Which weights a finetuning moves: one setting for all methods."""

from dataclasses import dataclass
from typing import Literal

from minillm.config import UserError

Method = Literal["full", "freeze", "lora", "adalora", "adapter", "prefix", "prompt"]


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """A method and its few options; each option names the methods that read it."""

    method: Method = "full"
    freeze_layers: int | None = None
    """freeze: the embeddings and so many first blocks of each stack stay as they are."""
    train_only: Literal["head"] | None = None
    """freeze: everything but the head stays as it is."""
    rank: int = 8
    """lora: rank of each update; adalora: mean rank of the updates at the end."""
    alpha: float | None = None
    """lora: the update is multiplied by alpha / rank, adalora: by alpha / initial_rank. None: 2 · rank."""
    dropout: float = 0.0
    """lora, adalora: on what the update reads."""
    targets: str = "all"
    """lora, adalora: linear layers by the ends of their names, separated by commas ("q_proj,v_proj"); all: every one
    inside the blocks."""
    initial_rank: int | None = None
    """adalora: rank of each update at the start. None: one and a half times `rank`."""
    rank_warmup: float = 0.1
    """adalora: share of the steps before the budget begins to fall."""
    rank_settle: float = 0.3
    """adalora: share of the steps after the budget has reached its target."""
    orthogonality: float = 0.1
    """adalora: weight of ‖PᵀP − I‖² + ‖QQᵀ − I‖² in the loss."""
    width: int = 32
    """adapter: width of the bottlenecks."""
    length: int = 16
    """prefix, prompt: virtual tokens in front of each document."""
    prefix_hidden: int | None = None
    """prefix: width of the network that the keys and values come out of while they are trained; saved without it.
    None: they are trained themselves."""

    def __post_init__(self) -> None:
        for name in ("rank", "width", "length", "initial_rank", "prefix_hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"method.{name} must be at least 1, not {value}")
        for name in ("dropout", "rank_warmup", "rank_settle"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"method.{name} must be in [0, 1), not {getattr(self, name)}")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"method.alpha must be positive, not {self.alpha}")
        if self.orthogonality < 0:
            raise UserError(f"method.orthogonality must not be negative, not {self.orthogonality}")
        if self.rank_warmup + self.rank_settle >= 1:
            raise UserError("method.rank_warmup and method.rank_settle leave no steps between them: lower one")
        if self.freeze_layers is not None and self.freeze_layers < 0:
            raise UserError(f"method.freeze_layers must not be negative, not {self.freeze_layers}")
        if self.start_rank < self.rank:
            raise UserError(f"method.initial_rank ({self.initial_rank}) is below method.rank ({self.rank}): ranks fall")
        chosen = [self.freeze_layers is not None, self.train_only is not None]
        if self.method == "freeze" and sum(chosen) != 1:
            raise UserError("method=freeze: give either --freeze-layers N or --train-only head")
        if self.method != "freeze" and any(chosen):
            raise UserError(f"--freeze-layers and --train-only belong to method=freeze, not {self.method}")

    @property
    def start_rank(self) -> int:
        """Rank of each of AdaLoRA's updates at the start."""
        return self.initial_rank or -(-3 * self.rank // 2)

    @property
    def scale(self) -> float:
        """What LoRA's or AdaLoRA's updates are multiplied by."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.method == "lora" else self.start_rank)
