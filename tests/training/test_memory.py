"""Memory runs out: what is left of the run, how it goes on, and how many rows a step is given to begin with."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from minillm.config import UserError
from minillm.data.loader import validation
from minillm.training import checkpoint, memory, pretrain
from minillm.training.distributed import Alone
from minillm.training.job import Job
from tests.training.jobs import go, job, weights
from tests.training.running import TINY, events, losses, train


class Scarce:
    """An objective for which memory runs out at every call with more than `room` rows, from one call on."""

    def __init__(self, work: Job, room: int, first: int, error: type[RuntimeError] = torch.OutOfMemoryError):
        self.objective, self.room, self.first, self.error, self.calls = work.objective, room, first, error, 0

    def __call__(self, model, batch):
        loss = self.objective(model, batch)  # draws for dropout, as a real attempt would have
        self.calls += 1
        if self.calls >= self.first and len(batch.samples) > self.room:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB (or: can't allocate memory)")
        return loss


def run(folder: Path, **options) -> Job:
    """Four steps of six rows with dropout, whose draws differ between micro-batches."""
    return job(folder, steps=4, model={"dropout": 0.2}, **options)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_the_step_is_done_again_as_if_the_micro_batch_had_been_smaller(tmp_path: Path, capsys, error) -> None:
    scarce = run(tmp_path / "scarce")
    scarce.objective = Scarce(scarce, room=2, first=3, error=error)  # at the third step: 6 rows, then 3, then 2
    assert go(scarce).reason == "finished"
    said = capsys.readouterr().err
    assert "step 3: memory ran out with 6 sequences at a time; it takes 3 from now on" in said
    assert "step 3: memory ran out with 3 sequences at a time; it takes 2 from now on" not in said  # half of 3 is 1
    assert "with 3 sequences at a time; it takes 1 from now on" in said

    knowing = run(tmp_path / "knowing")
    batch = knowing.batch

    def and_shrink(step: int):
        if step == 2:
            knowing.plan = dataclasses.replace(knowing.plan, micro_batch=1)
        return batch(step)

    knowing.batch = and_shrink
    go(knowing)
    assert losses(scarce.run) == losses(knowing.run)
    assert all(torch.equal(x, y) for x, y in zip(weights(scarce).values(), weights(knowing).values(), strict=True))
    assert json.loads((scarce.run / "config.json").read_text())["plan"]["micro_batch"] == scarce.plan.micro_batch == 1
    assert [(event["step"], event["micro_batch"]) for event in events(scarce.run, "memory")] == [(3, 3), (3, 1)]


def test_with_one_row_the_last_step_is_saved_and_the_error_says_what_helps(tmp_path: Path) -> None:
    work = run(tmp_path, micro=1)
    work.objective = Scarce(work, room=0, first=9)  # in the second step
    with pytest.raises(UserError, match=r"step 2: memory ran out with one sequence.*checkpoint-activations.*context"):
        go(work)
    folder = checkpoint.newest_valid(work.run, lambda line: None)
    assert folder is not None and folder.name == "step-1"
    saved = checkpoint.load_weights(folder)
    assert all(torch.equal(x, saved[name]) for name, x in weights(work).items())


def test_weights_that_have_moved_are_not_moved_again(tmp_path: Path, monkeypatch) -> None:
    work = run(tmp_path)

    def step(self, optimizer):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.amp.GradScaler, "step", step)
    with pytest.raises(UserError, match="while the optimizer moved the weights of step 1"):
        go(work)


def test_one_of_several_processes_cannot_go_back_alone(tmp_path: Path) -> None:
    class Pair(Alone):
        size = 2

    work = run(tmp_path)
    work.team, work.objective = Pair(), Scarce(work, room=3, first=1)
    with pytest.raises(UserError, match=r"on one process, with 6 sequences.*smaller --train.micro-batch"):
        go(work)


def test_validation_takes_no_more_rows_than_memory_has_for_training(text, tmp_path, capsys, monkeypatch) -> None:
    seen = []

    def recorded(*args, rows: int, **options):
        seen.append(rows)
        return validation(*args, rows=rows, **options)

    monkeypatch.setattr(pretrain, "validation", recorded)
    for micro in (4, 2):
        out = tmp_path / str(micro)
        done = train(capsys, "--data", text, "--out", out, *TINY, "--steps", 1, "--train.micro-batch", micro)
        assert done.code == 0
    assert seen == [32, 32, 2, 2]


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    work = run(tmp_path)

    def broken(model, batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    work.objective = broken
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        go(work)


def test_rows_are_measured_by_steps_of_a_copy(tmp_path: Path, monkeypatch) -> None:
    """With the memory of a GPU made up: 100 bytes a row beside the copy, and of 7 rows on none is left."""
    work, seen = run(tmp_path), []
    own, before = sum(p.nbytes for p in work.model.parameters()), weights(work)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: seen.clear())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: own + 100 * max(seen))
    limit = 7

    def objective(model, batch):
        seen.append(len(batch.samples))
        if seen[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work.objective(model, batch)

    def rows(first: int) -> int:
        return memory.measured_rows(
            first, work.settings, model=work.model, device=torch.device("cpu"), objective=objective,
            batch=work.batch(0), precision=nullcontext,
        )  # fmt: skip

    assert [rows(first) for first in (1, 3, 6)] == [6, 6, 6]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (560, 10**9))  # 594 for rows
    assert rows(6) == 3
    assert all(torch.equal(x, before[name]) for name, x in weights(work).items())
    limit = 0
    with pytest.raises(UserError, match="memory runs out even with one sequence at a time"):
        rows(6)


def test_smaller_divides_the_batch() -> None:
    assert [memory.smaller(rows, 12) for rows in (12, 6, 4, 3, 2, 1)] == [6, 3, 2, 1, 1, None]
    assert memory.smaller(7, 7) == 1


@pytest.mark.parametrize("weights", [0, 100])
@pytest.mark.parametrize("per_row", [1, 7])
@pytest.mark.parametrize("first", [1, 4, 48])
def test_the_largest_number_of_rows_that_fits(weights: int, per_row: int, first: int) -> None:
    divisors = [n for n in range(1, 49) if 48 % n == 0]
    for room in range(weights, weights + 50 * per_row):
        tried: list[int] = []

        def peak(rows: int, room=room, tried=tried) -> int | None:
            assert 48 % rows == 0 and rows not in tried
            tried.append(rows)
            need = weights + rows * per_row
            return None if need > 2 * room else need  # far too much does not even run

        wanted = max((n for n in divisors if weights + n * per_row <= room), default=None)
        assert memory.largest(first, 48, room, peak) == wanted
        assert len(tried) <= 5
