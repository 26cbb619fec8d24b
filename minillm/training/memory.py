"""How many rows go through the model at once: measured on a GPU before the run, and fewer where memory runs out in it.

A step's rows are passed in micro-batches whose gradients add up, so their size changes what a step takes and, but for
rounding and the draws of dropout, nothing that it learns.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from minillm.config import Settings, UserError
from minillm.data.batch import Batch
from minillm.training.job import Job
from minillm.training.monitor import Monitor
from minillm.training.objectives import Objective
from minillm.training.optim import build_optimizers
from minillm.training.run import write_json

Result = TypeVar("Result")

SPARE = 0.9
"""Share of a GPU's free memory that a measured step may take; the rest is for what allocators cannot give back."""


class OneRowTooMany(UserError):
    """Memory runs out in a step of one sequence at a time."""


def ran_out(error: RuntimeError) -> bool:
    """Whether it is a device that has no more memory, or a CPU whose process may have no more of it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def attempt(work: Callable[[], Result]) -> Result | None:
    """What `work` returns; None where memory ran out. (What it held is released with its error, as this call ends.)"""
    try:
        return work()
    except RuntimeError as error:
        if not ran_out(error):
            raise
    return None


@contextmanager
def no_way_back(job: Job, step: int) -> Iterator[None]:
    """While open, weights move. Raises `UserError` where memory runs out: the step cannot be done again."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise UserError(
            f"memory ran out while the optimizer moved the weights of step {step}; "
            f"{what_helps(job.settings, job.plan.device)}"
        ) from None


def shrink(job: Job, monitor: Monitor, step: int) -> None:
    """After an attempt at a step: smaller micro-batches from now on, which config.json keeps.

    Raises `OneRowTooMany` where they cannot be smaller, `UserError` where the step was that of several processes.
    """
    release(torch.device(job.plan.device))
    before, batch = job.plan.micro_batch, job.settings.train.batch
    rows = smaller(before, batch, each=rows_each(job.batch(step - 1), batch))
    helps = what_helps(job.settings, job.plan.device)
    if job.team.size > 1:  # the others are in the middle of a step that needs this rank
        raise UserError(
            f"step {step}: memory ran out on one process, with {before} sequences at a time; begin a run with a "
            f"smaller --train.micro-batch, or {helps}"
        )
    if rows is None:
        raise OneRowTooMany(f"step {step}: memory ran out with one sequence at a time; {helps}")
    monitor.say(f"step {step}: memory ran out with {before} sequences at a time; it takes {rows} from now on")
    monitor.event("memory", step=step, micro_batch=rows)
    job.plan = replace(job.plan, micro_batch=rows)
    job.config["plan"] = {**job.config.get("plan", {}), "micro_batch": rows}
    write_json(job.run / "config.json", job.config)


def release(device: torch.device) -> None:
    """Gives back what a failed attempt has left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def smaller(rows: int, batch: int, *, each: int = 1) -> int | None:
    """The largest divisor of the batch that is at most half of `rows`; None below one sample.

    Args:
        each: rows of a sample, which stay together.
    """
    fits = (each * samples for samples in range(rows // each // 2, 0, -1) if batch % samples == 0)
    return next(fits, None)


def rows_each(found: Batch, batch: int) -> int:
    """Rows of one of the `batch` samples that `found` holds, or a rank's share of them: a preference has two."""
    return max(1, len(found.samples) // batch)


def what_helps(settings: Settings, device: str) -> str:
    """What a person can change where not even one row fits."""
    less = "" if settings.train.checkpoint_activations else "--train.checkpoint-activations, or "
    return (
        f"free memory of the {device}, or begin a run with {less}a smaller --model.context, --model.dim or "
        "--model.layers"
    )


def largest(first: int, batch: int, room: float, peak: Callable[[int], int | None]) -> int | None:
    """The largest divisor of the batch with which a step fits, found by trying few of them; None where not even 1 does.

    Args:
        first: the divisor to begin with.
        room: bytes.
        peak: rows -> bytes at the peak of a step; None where memory ran out.

    Two measurements tell what a row takes; with one alone everything is thought to be in proportion to the rows, which
    guesses too few, since weights are not.
    """
    left = [rows for rows in range(1, batch + 1) if batch % rows == 0]
    fits, at_fits, rows = None, 0, first
    while True:
        need = peak(rows)
        if need is None or need > room:
            left = [n for n in left if n < rows]
            rows = left[len(left) // 2] if left else 0
        else:
            each = max(1.0, (need - at_fits) / (rows - (fits or 0)))
            fits, at_fits, left = rows, need, [n for n in left if n > rows]
            safe = [n for n in left if need + (n - rows) * each <= room]
            rows = safe[-1] if safe else left[0] if left else 0
        if not left:
            return fits


def measured_rows(
    first: int,
    settings: Settings,
    *,
    model: nn.Module,
    device: torch.device,
    objective: Objective,
    batch: Batch,
    precision: Callable[[], AbstractContextManager],
) -> int:
    """`largest` with real steps of a copy of the model on a GPU, uncompiled: compiled ones need less.

    Args:
        first: rows to begin with, as they were predicted.
        batch: all rows of a step, on the device.
        precision: the context of the forward pass.

    Raises `UserError` where one row is too much.
    """
    own = sum(p.nbytes for p in model.parameters())  # the copy's: in training there is none
    room = SPARE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))

    def peak(rows: int) -> int | None:
        def steps() -> int:
            _two_steps(copy.deepcopy(model), settings, objective, list(batch.split(rows))[:2], precision)
            return torch.cuda.max_memory_allocated(device) - own

        release(device)
        torch.cuda.reset_peak_memory_stats(device)
        return attempt(steps)

    try:
        rows = largest(first, len(batch.samples), room, peak)
    finally:
        release(device)
    if rows is None:
        raise UserError(
            f"{device.type} memory runs out even with one sequence at a time: {what_helps(settings, 'GPU')}"
        )
    return rows


def _two_steps(
    model: nn.Module,
    settings: Settings,
    objective: Objective,
    parts: list[Batch],
    precision: Callable[[], AbstractContextManager],
) -> None:
    """Steps with one micro-batch, or two where there are several: the second one meets the gradients of the first.

    Two steps, since the optimizer's state exists from the first one's end on.
    """
    optimizers = build_optimizers(model, settings.optim)
    for _ in range(2):
        for part in parts:
            with precision():
                loss = objective(model, part)
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
