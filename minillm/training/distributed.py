"""Processes that train together as if they were one.

    batch of a step = rows of rank 0, rows of rank 1, …        loss = Σ over ranks / targets of all ranks

`Alone` is a run in one process, where nothing needs to be agreed; `Group` is one of several that torchrun started. The
loop asks either the same questions. All ranks take the same decisions at the same places, because what they decide by
is summed or gathered first: a rank that went its own way would leave the others waiting.

    ddp     each rank holds the whole model, and gradients are averaged (DistributedDataParallel)
    fsdp    each rank holds a part of every tensor, and gathers a block's when it computes it (fully_shard)
"""

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minillm.config import Settings, TrainConfig
from minillm.data.batch import Batch
from minillm.training import checkpoint, nonfinite
from minillm.training.objectives import Objective
from minillm.training.signals import Signals


class Call(Protocol):
    """Computes an objective with a model's weights, wherever they are."""

    def __call__(self, objective: Objective, model: nn.Module, batch: Batch, *, last: bool = True) -> Tensor:
        """`last`: of the micro-batches of a step, after which gradients are exchanged."""
        ...


def apply(objective: Objective, model: nn.Module, batch: Batch, *, last: bool = True) -> Tensor:
    """The `Call` of a model that is all here."""
    return objective(model, batch)


def whole(x: Tensor) -> Tensor:
    """A DTensor's full value, for which all ranks have to ask; any other tensor itself."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def place(x: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor, where `like` is a DTensor."""
    if not hasattr(like, "device_mesh"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)


class Alone:
    """One process: what a group does by talking is done by nothing."""

    rank, size = 0, 1
    muon: type[torch.optim.Optimizer] = torch.optim.Muon

    @property
    def lead(self) -> bool:
        """Whether this is the rank that writes what is written once, and that a person sees."""
        return self.rank == 0

    def check(self, settings: Settings) -> None:
        """Raises `UserError` for settings with which this many processes cannot train."""

    def rows(self, batch: int) -> tuple[int, int]:
        """(first, count) of this rank's rows in a batch of `batch`."""
        return 0, batch

    def compiles(self, config: TrainConfig) -> bool:
        """Whether torch.compile may be tried."""
        return True

    def threads(self, cores: int, known: int | None) -> int:
        """CPU threads for this process, of `cores`; `known` is how many it had when the run began."""
        return known or cores

    @property
    def neighbours(self) -> int:
        """Processes of the team on this machine, this one included."""
        return 1

    def log_to(self, run: Path) -> None:
        """From now on what this rank says goes into the run folder, unless it is the lead."""

    def lead_first(self) -> AbstractContextManager[None]:
        """The lead goes through what is inside before the others do: they find its files."""
        return nullcontext()

    def share(self, value: Any) -> Any:
        """The lead's value."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Everybody's, by rank."""
        return [value]

    def total(self, value: float) -> float:
        """The sum of everybody's, of the same type."""
        return value

    def slowest(self, seconds: float) -> float:
        """The longest of everybody's."""
        return seconds

    def any(self, flags: Tensor) -> Tensor:
        """bool, whether it is True anywhere."""
        return flags

    def poll(self, signals: Signals, *, midway: bool = False) -> None:
        """Raises `Stopped` on all ranks if any was asked to end, and lets all save if any was asked to.

        Args:
            midway: in the middle of a step, where a group has no time to talk: it notices at the end of the step.
        """
        signals.poll()

    def spread(self, model: nn.Module, config: TrainConfig) -> Call:
        """Prepares the model for training by all; its optimizers are to be built after it."""
        return apply

    def whole_model(self, model: nn.Module) -> nn.Module | None:
        """The model as one process has it, on the lead; all ranks have to ask."""
        return model

    def locate(self, model: nn.Module, batch: Batch, objective: Objective) -> tuple[str, list[int]]:
        """As `nonfinite.locate`, over everybody's rows."""
        return nonfinite.locate(model, batch, objective)

    def training(self, config: TrainConfig) -> AbstractContextManager[None]:
        """While open, a rank that is silent for too long ends the run."""
        return nullcontext()

    def busy(self, what: str) -> AbstractContextManager[None]:
        """While open, this rank does something alone, and may take its time."""
        return nullcontext()

    def save(self, run: Path, step: int, **content: Any) -> None:
        """As `checkpoint.save`; may return before all is written."""
        checkpoint.save(run, step, **content)

    def settle(self) -> None:
        """Waits for a checkpoint that is being written. Raises what went wrong with it."""

    def random_of(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """This rank's random state in a checkpoint's training state; None if it was not among the ranks that saved."""
        return state["random"]


ALONE = Alone()


@contextmanager
def join() -> Iterator[Alone]:
    """The group that torchrun (or srun, by the same variables) made this process a member of; else `Alone`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    from minillm.training.group import joined

    with joined() as group:
        yield group


def micro_batch(planned: int, rows: int) -> int:
    """Rows of a pass: the planned ones, or fewer, so that every rank makes equally many passes over its `rows`."""
    return math.gcd(planned, rows)


def placed(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The full weights of a checkpoint as the model holds them."""
    own = model.state_dict()
    return {name: place(x, own[name]) if name in own else x for name, x in weights.items()}


def placed_state(values: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's full state of a checkpoint as its weights are held."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {
            key: place(x, parameters[number]) if isinstance(x, Tensor) and x.shape == parameters[number].shape else x
            for key, x in each.items()
        }
        for number, each in values["state"].items()
    }
    return {**values, "state": state}
