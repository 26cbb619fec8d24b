"""How a run's minutes are shared out, and how a plan is read back."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from minillm.config import DamagedFile
from minillm.training import finetune
from minillm.training.plan import CHOOSING, VALIDATING, Plan, _steps_that_fit, known_plan


@pytest.mark.parametrize(
    ("share", "eval_every", "expected"),
    [
        (VALIDATING, None, (96, 96)),  # two of 2 s, at the start and at the end: more would pass 5 %
        (CHOOSING, None, (88, 18)),  # six: where they choose the best step
        (VALIDATING, 10, (80, 10)),  # as asked for, whatever it takes
    ],
)
def test_validations_take_their_share_of_the_minutes(share: float, eval_every: int | None, expected) -> None:
    steps, every = _steps_that_fit(100.0, 1.0, 2.0, share, eval_every)
    assert (steps, every) == expected
    assert steps * 1.0 + (1 + -(-steps // every)) * 2.0 <= 100.0


def test_a_begun_runs_plan_is_read_back_whole_or_not_at_all(tmp_path):
    plan = Plan(
        device="cpu", dtype="fp32", kernels="torch", compile=False, threads=1, micro_batch=2, steps=7, eval_every=3,
        save_every=3, log_every=1, seconds_per_step=0.5, seconds_per_validation=0.25,
    )  # fmt: skip
    kept = {**asdict(plan), "parameters": 5}
    assert known_plan({"plan": kept}, tmp_path) == plan and known_plan({}, tmp_path) is None
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
