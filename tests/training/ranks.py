"""Groups of real processes for a test: forked from one that has imported everything, so that each takes no time."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from minillm.training import checkpoint
from minillm.training.distributed import Alone, join
from minillm.training.loop import Job, train
from minillm.training.optim import build_optimizers
from minillm.training.signals import Signals
from tests.training.jobs import job, rows
from tests.training.running import losses

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.training.ranks", "minillm.training.group", "minillm.commands.train"])


class Ranks:
    """`size` processes that call function(rank, *args) as torchrun would have started them."""

    def __init__(self, size: int, function: Callable[..., Any], *args: Any):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.ends, self.processes = [], []
        for rank in range(size):
            ours, theirs = _PROCESSES.Pipe()
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            process = _PROCESSES.Process(target=_rank, args=(theirs, variables, function, rank, args))
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def results(self, seconds: float = 120) -> list[Any]:
        """What each returned, by rank; fails where one did not return."""
        found = []
        for rank, end in enumerate(self.ends):
            assert end.poll(seconds), f"rank {rank} does not come to an end"
            try:
                found.append(end.recv())
            except EOFError:
                raise AssertionError(f"rank {rank} ended with {self.codes()[rank]}") from None
        self.codes()
        return found

    def codes(self, seconds: float = 60) -> list[int | None]:
        """Exit codes; negative ones are signals."""
        for process in self.processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()
        return [process.exitcode for process in self.processes]


def _rank(end: Connection, variables: dict[str, Any], function: Callable[..., Any], rank: int, args: tuple) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    end.send(function(rank, *args))


def spread_job(team: Alone, run: Path, **values: Any) -> Job:
    """jobs.job, shared out over the ranks of a team as `pretrain` does."""
    work = job(run, **values)
    first, count = team.rows(work.settings.train.batch)
    call = team.spread(work.model, work.settings.train)
    return replace(
        work,
        plan=replace(work.plan, micro_batch=min(work.plan.micro_batch, count)),
        batch=lambda step: rows(step * work.settings.train.batch + first, count),
        validation=lambda: [rows(10_000 + 4 * i, 4) for i in range(team.rank, 4, team.size)],
        optimizers=build_optimizers(work.model, work.settings.optim, muon=team.muon),
        team=team,
        call=call,
    )


def trained(rank: int, run: Path, resume: bool, values: dict[str, Any]) -> Any:
    """Trains in a group, or alone; returns what the loop wrote, from rank 0."""
    with join() as team:
        team.log_to(run)
        work = spread_job(team, run, **values)
        folder = team.share(checkpoint.resolve(run)) if resume else None
        train(work, Signals(), resume_from=folder)
        return losses(run)
