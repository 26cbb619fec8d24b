"""Groups of real processes for a test: forked from one that has imported everything, so that each takes no time."""

import importlib
import math
import multiprocessing
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from minillm.cli import run as command
from minillm.data.batch import Batch
from minillm.training import checkpoint, guard, parts, shelf, snapshot
from minillm.training.distributed import Alone, join, whole
from minillm.training.job import Job, TrainingFailed
from minillm.training.loop import train
from minillm.training.optim import build_optimizers
from minillm.training.signals import Signals
from tests.training.jobs import job, rows
from tests.training.running import losses

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.training.ranks", "minillm.training.group", "minillm.commands.train"])


class Ranks:
    """`size` processes that call function(rank, *args) as torchrun would have started them.

    Args:
        terminal: a file for what they say where a person would see it.
    """

    def __init__(self, size: int, function: Callable[..., Any], *args: Any, terminal: Path | None = None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.ends, self.processes = [], []
        for rank in range(size):
            ours, theirs = _PROCESSES.Pipe()
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            process = _PROCESSES.Process(target=_rank, args=(theirs, variables, terminal, function, rank, args))
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def results(self, seconds: float = 120) -> list[Any]:
        """What each returned, by rank; fails where one did not return."""
        found = []
        for rank, end in enumerate(self.ends):
            if not end.poll(seconds):
                self.codes(0)  # ends them all
                raise AssertionError(f"rank {rank} does not come to an end")
            try:
                found.append(pickle.loads(end.recv_bytes()))
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


def _rank(
    end: Connection,
    variables: dict[str, Any],
    terminal: Path | None,
    function: Callable[..., Any],
    rank: int,
    args: tuple,
) -> None:
    if terminal is not None:
        with terminal.open("ab") as file:
            os.dup2(file.fileno(), 2)
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    end.send_bytes(pickle.dumps(function(rank, *args)))  # by value: a sender of shared memory would have to stay


def spread_job(team: Alone, run: Path, **values: Any) -> Job:
    """jobs.job, shared out over the ranks of a team as `pretrain` does."""
    work = job(run, **values)
    first, count = team.rows(work.settings.train.batch)
    call = team.spread(work.model, work.settings.train)
    torch.manual_seed(team.rank)  # as with dropout, of which each rank draws its own

    def batch(step: int) -> Batch:
        torch.rand(1)  # as dropout does in every step
        return rows(step * work.settings.train.batch + first, count)

    return replace(
        work,
        plan=replace(work.plan, micro_batch=min(work.plan.micro_batch, count)),
        batch=batch,
        validation=lambda: [rows(10_000 + 2 * i, 2) for i in range(team.rank, 12, team.size)],
        optimizers=build_optimizers(work.model, work.settings.optim, muon=team.muon),
        team=team,
        call=call,
    )


def trained(rank: int, run: Path, values: dict[str, Any]) -> Any:
    """Trains in a group, or alone; returns what the loop wrote, from rank 0."""
    with join() as team:
        team.log_to(run)
        work = spread_job(team, run, **values)
        train(work, Signals())
        return losses(run)


def exchanged(rank: int, run: Path, values: dict[str, Any]) -> tuple[list[str], tuple[int, ...] | None, set[bool]]:
    """Trains; whose gradient of the first weight a rank holds as each pass begins: nobody's, its own, all's.

    Then over which mesh that weight is divided, and whether a block's weights are whole between forward and backward.
    """
    held: list[str] = []
    gathered: set[bool] = set()
    with join() as team:
        work = spread_job(team, run, **values)
        mesh = getattr(next(work.model.parameters()), "device_mesh", None)

        def call(objective: Any, model: nn.Module, batch: Batch, *, last: bool = True) -> Tensor:
            if not model.training:
                return work.call(objective, model, batch, last=last)
            gradient = next(model.parameters()).grad
            of_all = team.gather(None if gradient is None else whole(gradient))
            alike = all(torch.equal(each, of_all[0]) for each in of_all if each is not None)
            held.append("nobody's" if gradient is None else "all's" if alike else "its own")
            loss = work.call(objective, model, batch, last=last)
            gathered.add(not hasattr(next(model.decoder.blocks[0].parameters()), "device_mesh"))
            return loss

        train(replace(work, call=call), Signals())
    return held, None if mesh is None else tuple(mesh.shape), gathered


def answered(rank: int, made: Path) -> list[Any]:
    """What a team agrees on: a sum of counts, one of losses, the longest, any, everybody's, the lead's, its file."""
    with join() as team:
        with team.lead_first():
            if team.lead:
                time.sleep(0.3)
                made.touch()
            found = made.exists()
        flags = team.any(torch.tensor([rank == 0, rank == 1, False]))
        sums = team.total(rank + 1), team.total(rank / 2)
        return [*sums, team.slowest(float(rank)), flags.tolist(), team.gather(rank), team.share(rank), found]


def overtaken(rank: int, run: Path) -> list[int]:
    """Changes a tensor of 1, 1, 1 … as soon as `save` has returned; the checkpoints that are there after `settle`."""
    publish = shelf.publish

    def slowly(*folders: Path) -> None:
        time.sleep(0.5)
        publish(*folders)

    shelf.publish = slowly
    with join() as team:
        x = distribute_tensor(torch.ones(100_000), init_device_mesh("cpu", (team.size,)), [Shard(0)])
        team.shards = True
        team.save(run, 1, weights={"x": x}, state={"random": rank}, config={}, tokenizer=None, keep=1)
        x.zero_()
        team.settle()
        return checkpoint.steps(run)


def obstructed(rank: int, argv: list[str]) -> int:
    """`minillm train ARGV` with a file where each checkpoint's folder of parts should be; its exit code."""
    write = parts.write

    def in_the_way(folder: Path, *rest: Any) -> Any:
        folder.touch()
        return write(folder, *rest)

    parts.write = in_the_way
    return command("train", argv)


def commanded(rank: int, argv: list[str]) -> int:
    """`minillm train ARGV`; its exit code."""
    return command("train", argv)


def stopped(rank: int, argv: list[str], who: int, where: str) -> None:
    """`minillm train ARGV`, in which rank `who` gets SIGTERM as it comes to a function, MODULE.NAME."""
    module, _, name = where.rpartition(".")
    home = importlib.import_module(module)
    real = getattr(home, name)

    def then(*args: Any, **options: Any) -> Any:
        if rank == who:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    setattr(home, name, then)
    raise SystemExit(command("train", argv))


def resumed(rank: int, run: Path, values: dict[str, Any]) -> Any:
    """Goes on from the newest checkpoint; what the ranks together have loaded, and what the loop wrote, from rank 0.

    (weights, moments of the optimizers, random states by rank, losses)
    """
    with join() as team:
        team.log_to(run)
        work = spread_job(team, run, **values)
        folder = team.share(checkpoint.resolve(run))
        snapshot.put_back(work, torch.amp.GradScaler("cpu", enabled=False), folder)
        weights = {name: whole(x).clone() for name, x in work.model.state_dict().items()}
        states = [optimizer.state_dict()["state"] for optimizer in work.optimizers]
        moments = [
            {key: {k: whole(x).clone() for k, x in each.items()} for key, each in state.items()} for state in states
        ]
        random = team.gather(torch.get_rng_state())
        train(work, Signals(), resume_from=folder)
        return weights, moments, random, losses(run)


def misbehaving(rank: int, run: Path, what: str, values: dict[str, Any], at: int | None = 2) -> None:
    """Begins a run, or goes on from its newest checkpoint; as rank 1 comes to the step after `at`, it does `what`."""
    with join() as team, Signals() as signals:
        team.log_to(run)
        work = spread_job(team, run, **values)
        with team.lead_first():
            folder = checkpoint.newest_valid(run, print) if team.lead else None

        def batch(step: int) -> Batch:
            if rank == 1 and step == at:
                DEEDS[what]()
            return work.batch(step)

        outcome = train(replace(work, batch=batch), signals, resume_from=team.share(folder))
    raise SystemExit(outcome.code)


def poisoned(rank: int, run: Path, sample: int, values: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Trains with a loss that is NaN for one sample; why it fails, and the weights then."""
    with join() as team:
        work = spread_job(team, run, **values)

        def objective(model: nn.Module, batch: Batch) -> Tensor:
            loss = work.objective(model, batch)
            return loss * math.nan if sample in batch.samples else loss

        with pytest.raises(TrainingFailed) as failed:
            train(replace(work, objective=objective), Signals())
        return str(failed.value), {name: whole(x) for name, x in work.model.state_dict().items()}


def passing_over(
    rank: int, run: Path, faults: dict[int, float], values: dict[str, Any]
) -> tuple[list[int], dict[str, Tensor]]:
    """Trains with the loss of rank 1's rows multiplied in some steps (from 1); the steps that moved nothing, and the
    weights in the end. Four norms are enough to tell a spike; to rank 0 no norm seems unusual."""
    guard.FEWEST = 4
    if rank == 0:
        guard.highest_usual = lambda norms: math.inf
    with join() as team:
        work = spread_job(team, run, **values)
        stood: list[int] = []
        before: list[Tensor] = []

        def objective(model: nn.Module, batch: Batch) -> Tensor:
            step = batch.samples[0] // work.settings.train.batch + 1
            return work.objective(model, batch) * (faults.get(step, 1.0) if rank == 1 else 1.0)

        def batch(step: int) -> Batch:
            now = whole(next(work.model.parameters())).detach().clone()
            if before and torch.equal(before.pop(), now):
                stood.append(step)
            before.append(now)
            return work.batch(step)

        train(replace(work, objective=objective, batch=batch, score=work.objective), Signals())
        return stood, {name: whole(x).detach().clone() for name, x in work.model.state_dict().items()}


def _raise() -> None:
    raise LookupError("no such token")


DEEDS: dict[str, Callable[[], Any]] = {
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stalls": lambda: time.sleep(600),
    "raises": _raise,
    "gets SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "gets SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
}
