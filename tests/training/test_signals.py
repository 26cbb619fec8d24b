"""SIGTERM and SIGINT save the last finished step and say so; SIGUSR1 saves and goes on; a second SIGINT quits."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillm.cli import run as command
from minillm.training import checkpoint
from minillm.training.loop import train as run_job
from minillm.training.objectives import Evaluation
from minillm.training.signals import Signals, Stopped
from tests.training.jobs import go, job, weights
from tests.training.running import ROOT, TINY, events, losses, train

DROPOUT = {"model": {"dropout": 0.2}, "train": {"eval_every": 4, "save_every": 3}}
STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number, code", STOPS)
@pytest.mark.parametrize("moment", ["between micro-batches", "validation", "sampling"])
def test_stopped_and_resumed_is_as_if_never_stopped(tmp_path: Path, number: int, code: int, moment: str) -> None:
    """Losses, weights, samples and the best checkpoint are those of the run that nothing stopped."""

    def plain(name: str):
        work = job(tmp_path / name, steps=10, micro=2, **DROPOUT)
        sample = lambda model, step: [{"prompt": "", "text": str(step), "parses": None, "tried": 1}]  # noqa: E731
        return replace(work, sample=sample, plan=replace(work.plan, eval_every=3 if moment == "sampling" else 4))

    whole = plain("whole")
    go(whole)
    work, calls = plain("stopped"), []
    # Three micro-batches a step, two batches a validation: in step 5, in the second validation, at the second sample.
    due = {"between micro-batches": 4 * 3 + 2, "validation": 3, "sampling": 2}[moment]

    def when_due(result):
        calls.append(1)
        if len(calls) == due:
            send(number)
        return result

    changed = {
        "between micro-batches": lambda: replace(work, objective=lambda m, b: when_due(whole.objective(m, b))),
        "validation": lambda: replace(work, validation=lambda: [when_due(b) for b in whole.validation()]),
        "sampling": lambda: replace(work, sample=lambda m, s: when_due(whole.sample(m, s))),
    }[moment]()
    with Signals() as signals:
        outcome = run_job(changed, signals)
    assert (outcome.reason, outcome.code) == ("signal", code)
    step = 3 if moment == "sampling" else 4
    assert checkpoint.steps(work.run)[-1] == step and events(work.run, "end")[0]["reason"] == "signal"

    again = plain("stopped")
    with Signals() as signals:
        outcome = run_job(again, signals, resume_from=checkpoint.resolve(work.run))
    assert (outcome.reason, outcome.code) == ("finished", 0)
    assert losses(work.run) == losses(whole.run)
    assert all(torch.equal(a, b) for a, b in zip(weights(again).values(), weights(whole).values(), strict=True))
    assert [e["step"] for e in events(work.run, "sample")] == [0, 3, 10]
    assert (work.run / "checkpoints" / "best").read_text() == (whole.run / "checkpoints" / "best").read_text()


def test_a_stop_in_the_last_validation_loses_no_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([5.0, 4.0, 3.0])  # the last one belongs to the resumed run

    def score(model, batches, precision, poll, *_):
        if not again and (tmp_path / "checkpoints" / "best").exists():
            send(signal.SIGTERM)
        poll()
        return Evaluation(next(scores), 8)

    monkeypatch.setattr("minillm.training.loop.evaluate", score)
    again = False
    with Signals() as signals:
        assert run_job(job(tmp_path, steps=4, train={"eval_every": 2, "save_every": 2}), signals).code == 143
    folder = checkpoint.resolve(tmp_path)
    assert folder.name == "step-4" and (tmp_path / "checkpoints" / "best").read_text() == "step-2\n"
    again = True
    assert (
        run_job(job(tmp_path, steps=4, train={"eval_every": 2, "save_every": 2}), Signals(), resume_from=folder).code
        == 0
    )
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-4\n"
    assert events(tmp_path, "end")[-1]["best_loss"] == 3.0


def test_sigusr1_saves_and_goes_on(tmp_path: Path) -> None:
    work = job(tmp_path, steps=6, train={"save_every": 6, "keep": 9})

    def batch(step: int):
        if step == 2:
            send(signal.SIGUSR1)
        return job_batch(step)

    job_batch = work.batch
    with Signals() as signals:
        outcome = run_job(replace(work, batch=batch), signals)
    assert outcome.code == 0 and checkpoint.steps(tmp_path) == [3, 6]


def test_before_training_a_stop_comes_at_once() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    for number, code in STOPS:
        with pytest.raises(Stopped) as raised, Signals():
            try:
                send(number)
                time.sleep(5)
            except Exception:  # what a library on the way might do
                pytest.fail("a stop is no fault to recover from")
        assert raised.value.code == code
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers


@pytest.fixture(scope="module")
def never_stopped(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert command("train", ["--data", str(text), "--out", str(run), *TINY, "--steps", "3"]) == 0
    return losses(run)


@pytest.mark.parametrize(
    "where, number, code, there",
    [
        ("minillm.commands.corpus.run_tokenizer", signal.SIGTERM, 143, []),
        ("minillm.commands.corpus.run_shards", signal.SIGINT, 130, ["tokenizer"]),
        ("minillm.training.pretrain.make_plan", signal.SIGTERM, 143, ["data", "tokenizer"]),
        ("minillm.training.pretrain.baselines", signal.SIGINT, 130, ["data", "tokenizer"]),
    ],
)
def test_before_the_first_step(
    capsys, text: Path, tmp_path: Path, monkeypatch, never_stopped, where: str, number: int, code: int, there: list[str]
) -> None:
    """There is nothing to save, so metrics.jsonl does not begin; resumed it is the run that nothing stopped."""
    monkeypatch.setattr(where, lambda *_, **__: send(number))
    run = tmp_path / "run"
    result = train(capsys, "--data", text, "--out", run, *TINY, "--steps", "3")
    assert result.code == code and "before the first step" in result.err and "Traceback" not in result.err
    assert sorted(path.name for path in run.iterdir()) == sorted(["config.json", *there])
    monkeypatch.undo()
    assert train(capsys, "--resume", run).code == 0
    assert losses(run) == never_stopped


def test_before_the_first_file_is_whole(capsys, text: Path, tmp_path: Path, monkeypatch, never_stopped) -> None:
    """There is nothing yet that --resume could go on with: the same command begins again, in the same folder."""
    run = tmp_path / "run"
    argv = ("--data", text, "--out", run, *TINY, "--steps", "3")
    monkeypatch.setattr("minillm.training.run.os.fsync", lambda _: send(signal.SIGTERM))
    assert train(capsys, *argv).code == 143
    monkeypatch.undo()
    assert [path.name for path in run.iterdir()] == ["config.tmp"]
    assert train(capsys, *argv).code == 0 and losses(run) == never_stopped


def test_a_second_ctrl_c_quits_at_once() -> None:
    """In a process of its own, which is busy with something that asks for no signal."""
    busy = """
import time
from minillm.training.signals import Signals
with Signals() as signals:
    signals.careful = True
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", busy], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)  # the first one waits for the step to end
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and time.monotonic() - begun < 2
    process.stdout.close()
