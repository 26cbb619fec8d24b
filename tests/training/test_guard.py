"""Steps that are passed over: weights, moments and ranks stay bit for bit, on all ranks alike, and not for ever."""

import copy
import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minillm.config import Settings, UserError, from_dict
from minillm.data.batch import Batch
from minillm.doctor import Problem, examine
from minillm.peft.config import MethodConfig
from minillm.peft.inject import inject
from minillm.training import checkpoint, guard
from minillm.training.guard import highest_usual
from minillm.training.job import Job, TrainingFailed
from minillm.training.loop import train
from minillm.training.optim import build_optimizers
from minillm.training.report import write_report
from minillm.training.run import write_json
from minillm.training.signals import Signals
from minillm.training.verdict import next_commands, verdict
from tests.training.jobs import go, job, weights
from tests.training.ranks import Ranks, passing_over
from tests.training.running import events, lines, losses
from tests.training.saving import same

BATCH = 6
FIVE = {"train": {"skip_spikes": 5}}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spike is told by the last eight norms, from four on."""
    monkeypatch.setattr(guard, "WINDOW", 8)
    monkeypatch.setattr(guard, "FEWEST", 4)


def planted(work: Job, faults: dict[int, float], held: list[Any] | None = None) -> Job:
    """The job with the loss of some steps (from 1) multiplied; `held` gets what training held before each step."""

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        return work.objective(model, batch) * faults.get(batch.samples[0] // BATCH + 1, 1.0)

    def batch(step: int) -> Batch:
        if held is not None:
            moments = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in work.optimizers]
            ranks = None if work.allocator is None else copy.deepcopy(work.allocator.state())
            held.append({"weights": weights(work), "moments": moments, "ranks": ranks})
        return work.batch(step)

    return replace(work, objective=objective, batch=batch, score=work.objective)


def doctor_of(run: Path, work: Job) -> list[Problem]:
    write_json(run / "config.json", work.config)
    return examine(run)


def steps_of(run: Path, name: str = "skipped") -> list[int]:
    return [event["step"] for event in events(run, name)]


def test_a_spike_is_far_above_the_mean_in_deviations_and_in_times() -> None:
    assert highest_usual([1.0] * 63) == math.inf
    assert highest_usual([1.0] * 64) == 2.0, "norms that hardly differ: twice the mean"
    spread = [1.0, 3.0] * 32
    assert highest_usual(spread) == pytest.approx(2.0 + 6 * statistics.pstdev(spread)) == pytest.approx(8.0)


def test_by_default_the_first_ends_the_run_and_nothing_is_kept(tmp_path: Path, soon) -> None:
    work = job(tmp_path, steps=3)
    with pytest.raises(TrainingFailed, match=r"^step 2: the loss is not finite, first at .*, samples 6, .* unchanged"):
        go(planted(work, {2: math.nan}))
    (event,) = events(tmp_path, "nonfinite")
    assert event["skipped"] == 0 and not steps_of(tmp_path)
    work = job(tmp_path / "b", steps=7)
    assert go(planted(work, {6: 1e6})).reason == "finished" and not steps_of(tmp_path / "b")
    state = checkpoint.load_state(checkpoint.resolve(tmp_path / "b"))
    assert (state["progress"]["skipped"], state["progress"]["norms"]) == (0, [])


def test_one_then_six_in_a_row(tmp_path: Path, capsys) -> None:
    """Of at most five: the one is passed over, and so are five of the six; what they leave alone is all there is."""
    held: list[Any] = []
    faults = dict.fromkeys((3, 6, 7, 8, 9, 10, 11), math.nan)
    work = job(tmp_path, steps=20, **FIVE)
    with pytest.raises(TrainingFailed) as raised:
        go(planted(work, faults, held))
    assert str(raised.value).startswith("step 11: the loss is not finite, first at ")
    assert ", after 5 steps in a row were passed over; the weights are unchanged" in str(raised.value)
    assert steps_of(tmp_path) == [3, 6, 7, 8, 9, 10] and steps_of(tmp_path, "nonfinite") == [11]
    assert [line["step"] for line in lines(tmp_path, "train")] == [1, 2, 4, 5], "steps that were taken"
    for step, (before, after) in enumerate(itertools.pairwise(held), start=1):
        assert same(before["weights"], after["weights"]) == same(before["moments"], after["moments"])
        assert same(before["weights"], after["weights"]) == (step in faults), step
    assert same(held[-1]["weights"], weights(work))
    said = capsys.readouterr().err.splitlines()
    assert "step 3 is passed over: the loss is not finite (1 in a row, of at most 5)" in said
    assert "step 10 is passed over: the loss is not finite (5 in a row, of at most 5)" in said


def test_a_run_that_passed_over_a_step_is_one_that_never_met_it(tmp_path: Path) -> None:
    """At a constant rate: the same weights as those of a run whose data has a hole there."""
    steady = {"optim": {"schedule": "constant", "warmup": 0.0}}
    went_on, without = job(tmp_path / "a", steps=6, **FIVE, **steady), job(tmp_path / "b", steps=5, **steady)
    assert go(planted(went_on, {4: math.inf})).reason == "finished"
    whole = without.batch
    go(replace(without, batch=lambda step: whole(step + (step >= 3))))
    assert same(weights(went_on), weights(without))
    a, b = lines(tmp_path / "a", "train"), lines(tmp_path / "b", "train")
    assert [line["loss"] for line in a] == [line["loss"] for line in b]
    assert [line["step"] for line in a] == [1, 2, 3, 5, 6] and a[-1]["tokens"] == 6 * 48, "its batch was read"


def test_a_line_tells_the_mean_of_the_steps_that_were_taken(tmp_path: Path) -> None:
    work = job(tmp_path, steps=4, **FIVE)
    go(planted(replace(work, plan=replace(work.plan, log_every=4)), {2: math.inf, 3: math.inf}))
    (line,) = lines(tmp_path, "train")
    assert line["step"] == 4 and line["targets"] == 2 * 21 and math.isfinite(line["loss"])


def test_a_gradient_far_above_the_usual(tmp_path: Path, capsys, soon) -> None:
    held: list[Any] = []
    work = job(tmp_path, steps=16, **FIVE)
    go(planted(work, {4: 30.0, 14: 1000.0, 15: math.nan}, held))
    first, second = events(tmp_path, "skipped")
    assert (first["step"], first["what"]) == (14, "spike"), "step 4 was too early to tell"
    assert (second["step"], second["what"]) == (15, "loss")
    norms = [line["grad_norm"] for line in lines(tmp_path, "train")]
    assert first["usual"] == pytest.approx(statistics.fmean(norms[5:13])) and math.isfinite(first["loss"])
    assert first["grad_norm"] > 100 * first["usual"] > 0
    assert same(held[13], held[14]) and same(held[14], held[15]) and not same(held[12], held[13])
    shown = f"the gradient's norm is {first['grad_norm']:.3g}, where {first['usual']:.3g} is usual"
    assert f"step 14 is passed over: {shown} (1 in a row, of at most 5)" in capsys.readouterr().err
    kept = checkpoint.load_state(checkpoint.resolve(tmp_path))["progress"]["norms"]
    assert kept == [*norms[6:13], norms[-1]], "a step that is passed over is no measure"


def test_spikes_without_end_end_the_run(tmp_path: Path, soon) -> None:
    work = job(tmp_path, steps=20, train={"skip_spikes": 2})
    with pytest.raises(TrainingFailed, match=r"^step 12: the gradient's norm is .* is usual, after 2 steps in a row"):
        go(planted(work, dict.fromkeys(range(10, 20), 1000.0)))
    (event,) = events(tmp_path, "spikes")
    assert event["step"] == 12 and event["skipped"] == 2 and event["grad_norm"] > 100 * event["usual"]
    metrics = [*events(tmp_path, "skipped"), event]
    assert verdict({}, metrics)[0].startswith("Training broke down at step 12: the gradient's norm was ")
    assert next(command for command, _ in next_commands(tmp_path, {}, metrics)) == f"minillm doctor {tmp_path}"
    (problem,) = (problem for problem in doctor_of(tmp_path, work) if problem.kind == "spikes")
    assert "10, 11, 12; the last of them ended the run" in problem.message


def test_resumed_across_what_was_passed_over(tmp_path: Path, soon) -> None:
    """Saved within a row, before a spike that only the norms kept can tell, and after: the bits of a run never saved.

    An older checkpoint, which knows of neither, opens as well.
    """
    faults = {3: math.inf, 4: math.inf, 10: 1000.0}
    values = {"train": {"skip_spikes": 5, "save_every": 1, "keep": 100}}
    whole = job(tmp_path / "whole", steps=12, **values)
    go(planted(whole, faults))
    assert steps_of(tmp_path / "whole") == [3, 4, 10]
    for step in (3, 9, 10):
        again = job(tmp_path / "whole", steps=12, **values)
        train(planted(again, faults), Signals(), resume_from=tmp_path / "whole" / "checkpoints" / f"step-{step}")
        assert same(weights(whole), weights(again)) and steps_of(tmp_path / "whole") == [3, 4, 10], step
        assert same(*([o.state_dict() for o in each.optimizers] for each in (whole, again)))
    folder = tmp_path / "whole" / "checkpoints" / "step-11"
    state = checkpoint.load_state(folder)
    del state["progress"]["norms"], state["progress"]["skipped"]
    older = checkpoint.save(
        tmp_path / "older", 11, weights=checkpoint.load_weights(folder), state=state, config={}, tokenizer=None, keep=1
    )
    again = job(tmp_path / "older", steps=12, **values)
    train(again, Signals(), resume_from=older)
    assert same(weights(whole), weights(again))


def test_a_row_that_a_stop_interrupts_is_as_long_as_one_that_none_does(tmp_path: Path) -> None:
    values = {"train": {"skip_spikes": 2, "save_every": 1, "keep": 100}}
    for folder in (None, tmp_path / "checkpoints" / "step-3"):
        work = planted(job(tmp_path, steps=9, **values), dict.fromkeys((3, 4, 5, 6), math.nan))
        with pytest.raises(TrainingFailed, match=r"^step 5: .*, after 2 steps in a row were passed over"):
            train(work, Signals(), resume_from=folder)


def test_what_was_passed_over_stays_recorded_when_a_signal_comes_then(tmp_path: Path) -> None:
    """A signal saves before the chores of the step: its line and its event are of the step itself."""
    work = planted(job(tmp_path, steps=4, **FIVE), {2: math.nan})
    signals = Signals()
    batch = work.batch

    def stop(step: int) -> Batch:
        signals.stop = 15 if step == 1 else None
        return batch(step)

    team = type("Late", (type(work.team),), {"poll": lambda self, signals, midway=False: midway or signals.poll()})()
    assert train(replace(work, batch=stop, team=team), signals).reason == "signal"
    assert checkpoint.steps(tmp_path) == [2] and steps_of(tmp_path) == [2]
    again = job(tmp_path, steps=4, **FIVE)
    train(planted(again, {2: math.nan}), Signals(), resume_from=checkpoint.resolve(tmp_path))
    assert steps_of(tmp_path) == [2] and [line["step"] for line in lines(tmp_path, "train")] == [1, 3, 4]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_pass_over_the_same_steps(tmp_path: Path, parallel: str) -> None:
    """What is wrong with the rows of one rank is wrong for both; so is a spike, even where only one has seen it."""
    values = {"steps": 10, "train": {"batch": BATCH, "skip_spikes": 2, "parallel": parallel}}
    found = Ranks(2, passing_over, tmp_path, {3: math.nan, 9: 1000.0}, values).results()
    assert found[0][0] == found[1][0] == [3, 9]
    assert same(found[0][1], found[1][1]), "the ranks hold the same weights"
    assert [(e["step"], e["what"]) for e in events(tmp_path, "skipped")] == [(3, "loss"), (9, "spike")]
    assert events(tmp_path, "end")[0]["reason"] == "finished"


def test_the_importance_of_ranks_is_not_measured_on_what_is_passed_over(tmp_path: Path) -> None:
    """Neither on what the guard passes over, nor on what a scaler does."""
    work = job(tmp_path, steps=12, **FIVE)
    work = replace(work, plan=replace(work.plan, dtype="fp16"))
    adapted = inject(work.model, MethodConfig(method="adalora", rank=2, initial_rank=3))
    assert adapted.allocator is not None
    adapted.allocator.begin(12)
    with torch.no_grad():
        for layer in adapted.allocator.layers.values():
            layer.lora_E.fill_(0.1)
    held: list[Any] = []
    layer.lora_A.register_hook(lambda grad: grad * (math.inf if len(held) == 8 else 1.0))
    optim = build_optimizers(adapted.model, work.settings.optim)
    work = replace(work, model=adapted.model, optimizers=optim, allocator=adapted.allocator)
    go(planted(work, {4: math.nan}, held))
    assert not same(held[2]["ranks"], held[3]["ranks"]) and same(held[3], held[4]) and not same(held[4], held[5])
    assert same(held[7]["ranks"], held[8]["ranks"]) and steps_of(tmp_path) == [4]
    assert all(x.isfinite().all() for x in adapted.allocator.sensitivity.values())
    assert sum(adapted.allocator.ranks().values()) == 2 * len(adapted.allocator.layers)


def test_the_scaler_keeps_its_way_and_its_scale(tmp_path: Path) -> None:
    """An infinite gradient in fp16 halves the scale and is no spike; a loss that is not finite leaves the scale alone.

    What the scaler skips is not measured for AdaLoRA's ranks either, nor remembered as a norm.
    """
    work = job(tmp_path, steps=6, **FIVE)
    work = replace(work, plan=replace(work.plan, dtype="fp16"))
    calls = []
    work.model.embedding.weight.register_hook(
        lambda grad: grad * (math.inf if calls.append(0) or len(calls) == 2 else 1.0)
    )
    go(planted(work, {4: math.inf}))
    assert steps_of(tmp_path) == [4]
    state = checkpoint.load_state(checkpoint.resolve(tmp_path))
    assert state["scaler"]["scale"] == 2.0**15 and len(state["progress"]["norms"]) == 4
    assert len(calls) == 6 and losses(tmp_path)


def test_doctor_and_report_speak_of_it(tmp_path: Path) -> None:
    work = job(tmp_path, steps=6, **FIVE)
    go(planted(work, {2: math.nan, 4: math.inf}))
    (problem,) = (problem for problem in doctor_of(tmp_path, work) if problem.kind == "spikes")
    assert problem.message.startswith("2 steps (33.33%) met a loss or gradient that was not finite or far larger")
    assert ": 2, 4; all of them were passed over: look at what was read there" in problem.message
    page = write_report(tmp_path).read_text()
    assert "2 steps (2 and 4) were passed over, and moved nothing" in page
    assert "broke down" not in page and "NaN" not in page


def test_it_counts_steps() -> None:
    with pytest.raises(UserError, match=r"train\.skip_spikes must be at least 1, not 0"):
        from_dict(Settings, {"train": {"skip_spikes": 0}})
