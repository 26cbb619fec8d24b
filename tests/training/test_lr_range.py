"""The range test: what it reads out of curves that are known, when it ends, and the two commands that begin one."""

import math
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from minillm.commands import finetune as finetune_command
from minillm.commands import train as train_command
from minillm.commands.running import with_range
from minillm.config import OptimConfig, Settings, UserError, from_dict
from minillm.data.batch import Batch
from minillm.doctor import examine
from minillm.training import checkpoint, lr_range
from minillm.training.loop import train
from minillm.training.signals import Signals
from minillm.training.verdict import next_commands
from tests.finetuning import base, classify_file, minillm
from tests.training.jobs import go, job, weights
from tests.training.running import TINY, events, lines, losses, metrics
from tests.training.running import train as train_cli
from tests.training.saving import same

LINES = 100


def log_of(loss: Any, *, noise: float = 0.05, seed: int = 0, lines: int = LINES) -> list[dict[str, Any]]:
    """The lines of a test from 1e-4 to 1: `loss` of the rate's decade (−4 to 0), and noise."""
    draw = random.Random(seed)
    decades = [-4 + 4 * i / (lines - 1) for i in range(lines)]
    return [{"split": "train", "lr": 10**x, "loss": loss(x) + draw.gauss(0, noise)} for x in decades]


def valley(x: float) -> float:
    """Flat to 10^-3.5, down by 2 to 10^-2 (the steepest in the middle), flat to 10^-1, then up."""
    if x < -3.5:
        return 6.0
    if x < -2:
        return 5.0 + math.cos(math.pi * (x + 3.5) / 1.5)
    return 4.0 if x < -1 else 4.0 + 5 * (x + 1)


@pytest.mark.parametrize("seed", range(5))
def test_the_steepest_fall_and_the_turn_of_a_known_curve(seed: int) -> None:
    found = lr_range.read(log_of(valley, seed=seed))
    assert found is not None and found.fell and found.turned
    assert -3.1 < math.log10(found.steepest) < -2.4
    assert -2.4 < math.log10(found.turn[0]) < -1.6, "where the floor begins, though it is as low until 10^-1"
    assert found.turn[1] == pytest.approx(4.0, abs=0.15)
    assert lr_range.noise([3.0 * i for i in range(20)]) == 0, "a slope is no noise"
    assert found.noise == pytest.approx(0.05 / math.sqrt(7), rel=0.35)
    assert found.suggested == pytest.approx(found.turn[0] / lr_range.MARGIN)
    said = lr_range.sentences(log_of(valley, seed=seed))
    assert f"the loss fell the fastest at {found.steepest:.1e}, and turned at {found.turn[0]:.1e}" in said[0]
    assert f"suggests --optim.lr {found.suggested:.1e}" in said[1]


@pytest.mark.parametrize(
    "loss, words, rates",
    [
        (lambda x: 6.0, r"the loss went from [\d.]+ to [\d.]+ .* no rate can be named", "5 --optim.muon-lr 50"),
        (lambda x: min(6.0, 4 - x), r"never turned: it ended at 4\.\d+ .* may be better", "5 --optim.muon-lr 50"),
        (lambda x: 10 + 2 * x, r"from 2\.\d+ to 9\.\d+ .* no rate can be named", "0.05 --optim.muon-lr 0.5"),
    ],
    ids=["flat", "falling", "rising"],
)
@pytest.mark.parametrize("seed", range(3))
def test_what_was_not_found_is_said(loss: Any, words: str, rates: str, seed: int) -> None:
    """And the next command is the test with higher rates, or with lower ones where the loss only rose."""
    log = [*log_of(loss, seed=seed), {"event": "end", "reason": "finished", "step": 90}]
    (said,) = lr_range.sentences(log)
    assert re.search(words, said), said
    optim = {"schedule": "range", "lr": 0.5, "name": "muon", "muon_lr": 5.0, "embedding_lr": None}
    options = ["--optim.schedule", "range", "--optim.lr", "0.5", "--steps", "90"]
    config = {"settings": {"preset": "default", "optim": optim}, "options": options}
    ((command, _),) = next_commands(Path("r"), config, log)
    assert command == f"python train.py --preset default --optim.schedule range --steps 90 --optim.lr {rates}"


def test_a_loss_that_ends_in_nan_has_turned_and_too_few_lines_are_none() -> None:
    falling = log_of(lambda x: min(6.0, 4 - x))
    found = lr_range.read([*falling, {"event": "skipped", "step": 101, "what": "loss"}])
    assert found is not None and found.turned and found.suggested == pytest.approx(found.turn[0] / 3)
    assert lr_range.read(falling[:19]) is None and lr_range.read(falling[:20]) is not None
    assert lr_range.sentences(falling[:19]) == [
        "The log has 19 lines; a range test is read from 20 on: give it more --steps."
    ]


def test_it_is_over_far_above_the_lowest_and_not_for_noise() -> None:
    found = [line["loss"] for line in log_of(valley)]
    end = next(i for i in range(LINES + 1) if lr_range.is_over(found[:i]))
    assert math.log10(log_of(valley)[end - 1]["lr"]) == pytest.approx(-1 + 2 / 5 + 3 * 4 / 99, abs=0.1), (
        "half of 4 above it, three lines late"
    )
    draw = random.Random(0)
    for _ in range(50):
        converged = [0.05 * draw.expovariate(1) for _ in range(LINES)]
        assert not any(lr_range.is_over(converged[:i]) for i in range(LINES))


RANGE = {"optim": {"schedule": "range", "name": "sgd", "lr": 100.0}}


def test_it_ends_early_as_finished_and_resumes_bit_for_bit(tmp_path: Path, capsys) -> None:
    """Patience is not asked: low rates move nothing, and that is no reason to stop."""
    values = {**RANGE, "train": {"patience": 1, "save_every": 20, "eval_every": 10, "keep": 100}}
    whole = job(tmp_path, steps=80, **values)
    outcome = go(whole)
    step = outcome.progress.step
    assert (outcome.reason, outcome.code) == ("finished", 0) and 40 < step < 80
    assert events(tmp_path, "end")[0]["reason"] == "finished" and not events(tmp_path, "skipped")
    assert max(checkpoint.steps(tmp_path)) == step
    rates = [line["lr"] for line in lines(tmp_path, "train")]
    assert rates == pytest.approx([100 * 1e-4 ** (1 - i / 79) for i in range(len(rates))])
    wrote = losses(tmp_path)
    again = job(tmp_path, steps=80, **values)
    second = train(again, Signals(), resume_from=tmp_path / "checkpoints" / "step-40")
    assert (second.reason, second.progress.step) == ("finished", step)
    assert losses(tmp_path) == wrote and same(weights(whole), weights(again))


def test_it_ends_where_the_loss_is_not_finite(tmp_path: Path) -> None:
    work = job(tmp_path, steps=60, **RANGE)

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        return work.objective(model, batch) * (math.nan if batch.samples[0] >= 6 * 30 else 1.0)

    held = {}

    def batch(step: int) -> Batch:
        held.update(weights(work))
        return work.batch(step)

    outcome = go(replace(work, objective=objective, batch=batch, score=work.objective))
    assert (outcome.reason, outcome.code, outcome.progress.step) == ("finished", 0, 31)
    assert [event["step"] for event in events(tmp_path, "skipped")] == [31] and not events(tmp_path, "nonfinite")
    assert same(held, dict(checkpoint.load_weights(tmp_path / "checkpoints" / "step-31"))), "saved as they were"


def test_pretraining_end_to_end(text: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """The next command is this very run but for its schedule, length and rates."""
    run = tmp_path / "run"
    argv = ["--data", str(text), "--out", str(run), *TINY, "--seed", "3", "--optim.name", "muon"]
    ranging = ["--optim.schedule", "range", "--optim.lr", "1", "--steps", "60"]
    result = train_cli(capsys, *argv, *ranging)
    assert result.code == 0, result.err
    assert "the loss fell the fastest at" in result.out and "suggests --optim.lr" in result.out
    found = lr_range.read(metrics(run))
    assert found is not None and found.suggested is not None
    (command,) = [line.split(" the run itself")[0].strip() for line in result.out.splitlines() if "itself, at" in line]
    assert command.startswith("python train.py --preset llama-tiny")
    suggested = train_command._parse(shlex.split(command)[2:])
    expected = train_command._parse(argv)
    assert suggested.optim.lr == pytest.approx(found.suggested, rel=0.05)
    assert suggested.optim.muon_lr / suggested.optim.lr == pytest.approx(20.0, rel=0.1), "0.02 beside 1e-3"
    rates = {"lr": suggested.optim.lr, "muon_lr": suggested.optim.muon_lr}
    assert suggested == replace(expected, optim=replace(expected.optim, **rates), out=None)
    page = (run / "report.html").read_text()
    assert "Loss against the learning rate" in page and "rate 1.0e-04" in page and "best validation" not in page
    assert [problem.kind for problem in examine(run)] == []
    again = train_cli(capsys, "--resume", run)
    assert again.code == 0 and "is finished" in again.err


def test_finetuning_end_to_end(tmp_path: Path, capsys) -> None:
    model, run = base(tmp_path / "base", "encoder"), tmp_path / "run"
    data = classify_file(tmp_path / "data.jsonl", 60)
    argv = [str(model), "--task", "classify", "--data", str(data), "--train.threads", "1", "--train.batch", "4"]
    ranging = ["--optim.schedule", "range", "--optim.lr=1", "--steps", "80", "--out", str(run)]
    result = minillm(capsys, "finetune", f"{model}/", *argv[1:], *ranging)
    assert result.code == 0, result.err
    found = lr_range.read(metrics(run))
    assert found is not None and found.suggested is not None and "suggests --optim.lr" in result.out
    (command,) = [line.split(" the run itself")[0].strip() for line in result.out.splitlines() if "itself, at" in line]
    assert command.startswith(f"minillm finetune {model} --task classify")
    suggested, expected = finetune_command._parse(shlex.split(command)[2:]), finetune_command._parse(argv)
    assert suggested.optim.lr == pytest.approx(found.suggested, rel=0.05)
    assert suggested == replace(expected, optim=replace(expected.optim, lr=suggested.optim.lr))
    assert (run / "result.json").is_file() and "Loss against the learning rate" in (run / "report.html").read_text()


def test_the_rates_beside_it_keep_their_proportion_where_they_were_not_set() -> None:
    usual = OptimConfig(name="muon", lr=2e-3, embedding_lr=0.05)
    asked = replace(usual, lr=1.0, schedule="range")
    assert with_range(asked, usual) == replace(asked, muon_lr=10.0, embedding_lr=25.0)
    assert with_range(replace(asked, muon_lr=0.3), usual).muon_lr == 0.3
    assert with_range(replace(usual, lr=1.0), usual) == replace(usual, lr=1.0)


def test_it_has_an_end_of_its_own() -> None:
    with pytest.raises(UserError, match=r"train\.skip_spikes does not go with optim\.schedule=range"):
        from_dict(Settings, {"optim": {"schedule": "range"}, "train": {"skip_spikes": 1}})
