"""How a run's minutes are shared out, and how a plan is read back."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from minillm.config import DamagedFile, Settings, from_dict
from minillm.training import finetune, plan
from minillm.training.plan import UNNOTICED, VALIDATING, Plan, Rehearsal, known_plan, make_plan
from tests.training.jobs import job

NOBODY = Rehearsal(model=None, device=plan.torch.device("cpu"), objective=None, batch=None, poll=lambda: None)


@pytest.mark.parametrize(
    ("minutes", "train", "expected"),
    [
        (100 / 60, {}, (96, 96, True)),  # two of 2 s, before the first step and at the end: more would pass 5 %
        (60 / 60, {}, (58, 58, False)),  # two would: the one at the end is left
        (12 / 60, {}, (10, 10, False)),  # one would: there always is one
        (400 / 60, {}, (388, 78, True)),  # as many as are of use
        (100 / 60, {"patience": 3}, (88, 18, True)),  # more of them where they choose the best step
        (15 / 60, {"patience": 3}, (11, 11, True)),  # the model as it was may be the best
        (60 / 60, {"eval_every": 10}, (46, 10, True)),  # as asked for, whatever it takes
    ],
)
@pytest.mark.parametrize("unit", [1.0, 0.25])
def test_validations_take_their_share_of_the_minutes(monkeypatch, minutes: float, train, expected, unit) -> None:
    """A step takes one unit of time, a validation two."""
    monkeypatch.setattr(plan, "measure", lambda *args, **_: (unit, 0.02 * unit))
    settings = from_dict(Settings, {"minutes": unit * minutes, "model": {"vocab_size": 64}, "train": train})
    found = make_plan(
        settings, NOBODY, micro_batch=8, validation_rows=100,
    )  # fmt: skip
    assert (found.steps, found.eval_every, found.eval_first) == expected
    validations = found.eval_first + -(-found.steps // found.eval_every)
    assert found.seconds / unit == found.steps + 2 * validations <= 60 * minutes
    if not train and validations > 1:
        assert 2 * validations <= VALIDATING * 60 * minutes


@pytest.mark.parametrize(
    ("steps", "validation", "train", "expected"),
    [
        (1000, 4.0, {}, (100, 100)),  # 44 s of 1,000 and more
        (
            1000,
            10.0,
            {},
            (300, 100),
        ),  # the first and four more are affordable: after three parts, six, nine and at the end
        (1000, 100.0, {}, (1000, 100)),  # one would take too long, but at start and end there always is one
        (1000, 10.0, {"patience": 3}, (100, 100)),  # dear, but what the best step is chosen by
        (1000, 100.0, {"eval_every": 7}, (7, 7)),  # as asked for, whatever it takes
        (7, UNNOTICED / 11, {}, (1, 1)),  # a fifth of the time, and nobody waits for it
        (7, UNNOTICED / 5, {}, (3, 1)),
    ],
)
def test_a_run_of_steps_is_validated_as_often_as_it_can_afford(monkeypatch, steps, validation, train, expected) -> None:
    """A step takes a second. What is validated is saved, so that the best step can be kept."""
    monkeypatch.setattr(plan, "measure", lambda *args, **_: (1.0, validation / 100))
    settings = from_dict(Settings, {"steps": steps, "model": {"vocab_size": 64}, "train": train})
    found = make_plan(settings, NOBODY, micro_batch=8, validation_rows=100)
    assert (found.eval_every, found.save_every) == expected and found.eval_every % found.save_every == 0
    assert found.eval_first
    validations = 1 + -(-steps // found.eval_every)
    if not train and validations > 2:
        assert validations * validation <= max(UNNOTICED, VALIDATING * found.seconds) + 1e-9


@pytest.mark.parametrize("minutes", [2.0, 3.0, 4.0, 5.0, 8.0])
def test_what_is_validated_is_saved(monkeypatch, minutes: float) -> None:
    monkeypatch.setattr(plan, "measure", lambda *args, **_: (1.0, 0.02))
    settings = from_dict(Settings, {"minutes": minutes, "model": {"vocab_size": 64}})
    found = make_plan(settings, NOBODY, micro_batch=8, validation_rows=100)
    assert found.eval_every == found.steps or found.eval_every % found.save_every == 0
    assert 60 * minutes - 1 - 2 < found.seconds <= 60 * minutes


def test_samples_are_a_part_of_the_minutes(monkeypatch) -> None:
    monkeypatch.setattr(plan, "measure", lambda *args, **_: (1.0, 0.02))
    settings = from_dict(Settings, {"minutes": 2, "model": {"vocab_size": 64}})
    found = make_plan(
        settings, NOBODY, micro_batch=8, validation_rows=100, sampling=3.0,
    )  # fmt: skip
    assert found.sample_steps == (0, 27, 107) and found.seconds == 107 + 2 * 2 + 3 * 3 == 120
    one = replace(found, steps=1, eval_every=1)
    assert one.seconds == 1 + 2 * 2 + 2 * 3  # the first quarter of one step is its end


def test_a_step_is_timed_with_its_data_as_the_mean_of_all_but_the_first(monkeypatch, tmp_path) -> None:
    work, asked = job(tmp_path), []
    ticks = [9, 1, 1, 4, 5, 2, 4]  # seconds: four steps, three validations of a micro-batch of two
    clock = iter([at for tick in ticks for at in (0.0, float(tick))])
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    def batch(step: int):
        asked.append(step)
        return work.batch(step)

    before = {name: x.clone() for name, x in work.model.state_dict().items()}
    settings = replace(work.settings, steps=8)
    found = make_plan(
        settings, replace(NOBODY, model=work.model, objective=work.objective, batch=batch), micro_batch=2,
        validation_rows=40,
    )  # fmt: skip
    assert (found.seconds_per_step, found.seconds_per_validation) == (2.0, 40 / 2 * 3.0)
    assert asked == [0, 1, 2, 3, 0]
    assert all(plan.torch.equal(x, before[name]) for name, x in work.model.state_dict().items())


@pytest.mark.parametrize(
    ("device", "compile", "compiled"),
    [("cpu", "auto", False), ("cpu", "on", True), ("cuda", "auto", True), ("cuda", "off", False)],
)
def test_steps_are_compiled_on_a_gpu_or_where_asked_for(monkeypatch, device, compile, compiled) -> None:
    monkeypatch.setattr(plan, "measure", lambda *args, **_: (1.0, 0.02))
    monkeypatch.setattr(plan.ops, "selected", lambda device: ("torch", ""))
    settings = from_dict(Settings, {"steps": 9, "dtype": "fp32", "compile": compile, "model": {"vocab_size": 64}})
    there = replace(NOBODY, device=plan.torch.device(device))
    found = make_plan(settings, there, micro_batch=8, validation_rows=100)
    assert (found.compile, found.device) == (compiled, device)


def test_steps_are_timed_in_the_precision_of_the_run(monkeypatch, tmp_path) -> None:
    work, seen = job(tmp_path), []

    def objective(model, batch):
        seen.append(plan.torch.get_autocast_dtype("cpu") if plan.torch.is_autocast_enabled("cpu") else None)
        return work.objective(model, batch)

    there = replace(NOBODY, model=work.model, objective=objective, batch=work.batch)
    for dtype, expected in (("fp32", None), ("bf16", plan.torch.bfloat16)):
        seen.clear()
        plan.measure(replace(work.settings, steps=8), there, dtype, 2, at_least=1, budget=0.0)
        assert set(seen) == {expected}


def test_a_begun_runs_plan_is_read_back_whole_or_not_at_all(tmp_path):
    begun = Plan(
        device="cpu", dtype="fp32", kernels="torch", compile=False, threads=1, micro_batch=2, steps=7, eval_every=3,
        save_every=3, log_every=1, seconds_per_step=0.5, seconds_per_validation=0.25,
    )  # fmt: skip
    kept = {**asdict(begun), "parameters": 5}
    assert known_plan({"plan": kept}, tmp_path) == begun and known_plan({}, tmp_path) is None
    del kept["eval_first"], kept["seconds_per_sample"]  # as runs have it that were begun before there were these
    assert known_plan({"plan": kept}, tmp_path) == begun
    del kept["steps"]
    with pytest.raises(DamagedFile, match=r"config.json is damaged: its plan is not complete"):
        known_plan({"plan": kept}, tmp_path)


def test_metrics_are_a_part_of_what_a_validation_takes(monkeypatch, tmp_path):
    """Timed on 16 of 40 examples, two seconds by the clock: five for all of them."""
    seen = []
    task = SimpleNamespace(
        data=lambda examples, means: list(examples), metrics=lambda model, data, means, start: seen.append(len(data))
    )
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(finetune, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    work = SimpleNamespace(task=task, means=None, parts=SimpleNamespace(val=list(range(40))))
    assert finetune._scoring(work, None, None) == 5.0 and seen == [16]
