"""What is handed to the loop and what comes back: a job, how far it has come, how it ended."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from minillm.config import Settings
from minillm.data.batch import Batch
from minillm.training.distributed import ALONE, Alone, Call, apply
from minillm.training.objectives import Count, Objective, counted, likelihood
from minillm.training.plan import Plan
from minillm.training.profile import Profile


class TrainingFailed(Exception):
    """A step met NaN, Inf or one spike too many; the weights are those before it."""


class Allocator(Protocol):
    """What moves ranks around each optimizer step (minillm/peft/adalora.py)."""

    def regularise(self) -> None: ...

    def measure(self) -> None: ...

    def after_step(self, step: int) -> None: ...

    def ranks(self) -> dict[str, int]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass
class Job:
    """What is to be trained, and with what; `pretrain` puts it together."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    settings: Settings
    plan: Plan
    objective: Objective
    batch: Callable[[int], Batch]
    """Step -> this rank's rows of it; a pure function, so that a resumed run reads on where the first one stopped."""
    validation: Callable[[], Iterable[Batch]]
    run: Path
    config: dict[str, Any]
    """What checkpoints keep as config.json."""
    train_bits: float | None
    """Bits per byte for each nat per token, of the training text and of the validation text; None: not defined."""
    val_bits: float | None
    samples_per_epoch: int
    sample: Callable[[nn.Module, int], Iterable[dict[str, Any]]] | None = None
    """(model, step) -> events to write; must leave torch's global generator alone."""
    score: Objective = likelihood
    """What validation sums up; `objective` may add weights and regularisers to it."""
    count: Count = counted
    """What the sums of both are divided by."""
    metrics: Callable[[nn.Module], dict[str, float]] | None = None
    """Model -> a task's metrics on its validation data, for the validation line."""
    watch: str | None = None
    """The metric by which a model is the best, higher is better. None: the validation loss."""
    allocator: Allocator | None = None
    """AdaLoRA's."""
    profile: Profile | None = None
    """What watches some of the steps."""
    team: Alone = ALONE
    """The processes that train together; each has a job of its own."""
    call: Call = apply
    """Computes an objective with the model, as `team.spread` has prepared it."""


@dataclass
class Progress:
    """How far a run has come: all that the loop knows besides weights and optimizers, and saves with them."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    chores_done: bool = False
    """Whether validation and samples of `step` are behind us."""
    best_loss: float | None = None
    best_step: int | None = None
    best_score: float | None = None
    """What chose the best step; lower is better: the validation loss, or the negative of the watched metric."""
    worse: int = 0
    """Validations since the best one."""
    loss_sum: float = 0.0
    """Since the last line of the log, as the next three."""
    targets: int = 0
    line_tokens: int = 0
    line_seconds: float = 0.0
    skipped: int = 0
    """Steps in a row, up to the last one, that moved nothing (see guard.py)."""
    norms: list[float] = field(default_factory=list)
    """Of the gradients of the last steps that were taken, oldest first; kept with train.skip_spikes."""
    curve: list[float] = field(default_factory=list)
    """Losses of the lines of the log, of a range test alone."""

    def advance(self, *, tokens: int, loss_sum: float, targets: int) -> None:
        """A step is done; `loss_sum` is over its targets."""
        self.step += 1
        self.chores_done = False
        self.tokens += tokens
        self.line_tokens += tokens
        self.loss_sum += loss_sum
        self.targets += targets

    def begin_line(self, seconds: float) -> None:
        """A line of the log is written, `seconds` after training began: what comes now belongs to the next one."""
        self.loss_sum, self.targets, self.line_tokens = 0.0, 0, 0
        self.line_seconds = seconds

    def judge(self, score: float, loss: float) -> None:
        """A validation is done: the best one so far, or one more since that."""
        if self.best_score is None or score < self.best_score:
            self.best_score, self.best_loss, self.best_step, self.worse = score, loss, self.step, 0
        else:
            self.worse += 1


@dataclass(frozen=True)
class Outcome:
    reason: str
    """finished, early stop, or signal"""
    code: int
    progress: Progress
