"""The state of a run between two steps, taken for a checkpoint and put back from one.

    progress      how far it has come                    optimizers   moments, steps, peak rates
    random        torch's generators on this rank        scaler       fp16's scale
    ranks         where AdaLoRA's stand

Weights lie beside it, in a file of their own. Put back, a run writes the same numbers as one that was never stopped.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillm.config import UserError
from minillm.training import checkpoint
from minillm.training.distributed import placed, placed_state
from minillm.training.job import Job, Progress


def take(job: Job, progress: Progress, scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """What `checkpoint.save` is to keep as the training state."""
    return {
        "progress": asdict(progress),
        "optimizers": [optimizer.state_dict() for optimizer in job.optimizers],
        "scaler": scaler.state_dict(),
        "random": random_state(),
        "ranks": None if job.allocator is None else job.allocator.state(),
    }


def put_back(job: Job, scaler: torch.amp.GradScaler, folder: Path) -> Progress:
    """Weights, optimizers and generators as a checkpoint has them; returns how far the run had come.

    Raises `UserError` where the checkpoint does not fit the job.
    """
    state = checkpoint.load_state(folder)
    try:
        put_back_weights(job.model, folder)
        for optimizer, values in zip(job.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(placed_state(values, optimizer))
        scaler.load_state_dict(state["scaler"])
        if job.allocator is not None:
            job.allocator.load_state(state["ranks"])
        random = job.team.random_of(state)
        if random is not None:
            set_random_state(random)
        return Progress(**state["progress"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} does not fit this run: {str(error).splitlines()[0]}") from error


def put_back_weights(model: nn.Module, folder: Path) -> None:
    model.load_state_dict(placed(checkpoint.load_weights(folder), model))


def random_state() -> dict[str, Any]:
    """Of torch's generators: the CPU's, and this process's GPU's where it has one."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
