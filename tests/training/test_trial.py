"""What is tried before a long run on a CPU, and what is taken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minillm.config import Settings, from_dict
from minillm.training import plan, pretrain, trial
from minillm.training.trial import Way, choose
from tests.training.running import TINY, losses, train

CPU = torch.device("cpu")
OTHERS = trial._others


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    """As many as torch is told, and a processor with bf16 instructions."""
    known = SimpleNamespace(threads=4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: known.threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: setattr(known, "threads", threads))
    monkeypatch.setattr(plan, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(trial, "_others", lambda: 0.0)
    return known


def rehearsal(batch) -> plan.Rehearsal:
    return plan.Rehearsal(model=None, device=CPU, objective=None, batch=batch, poll=lambda: None)


def chosen(monkeypatch, seconds, *, rows: int = 8, each: int = 1, **settings) -> tuple[Way, list[Way]]:
    """What is taken, and all that was tried, where a step in a way takes `seconds(way)`."""
    tried = []

    def measure(settings, rehearsal, dtype, micro_batch, **_):
        tried.append(Way(dtype, torch.get_num_threads(), micro_batch))
        return seconds(tried[-1]), 0.0

    monkeypatch.setattr(plan, "measure", measure)
    values = {"minutes": 10.0, "model": {"dim": 64, "heads": 2}, "train": {"batch": 8}, **settings}
    found = choose(
        from_dict(Settings, values), rehearsal(lambda step: SimpleNamespace(samples=range(8 * each))), micro_batch=rows,
    )  # fmt: skip
    assert list(found.seconds) == tried and torch.get_num_threads() == found.best.threads
    return found.best, tried


def test_each_knob_is_turned_as_long_as_it_helps(monkeypatch) -> None:
    def seconds(way: Way) -> float:
        return {"bf16": 0.5, "fp32": 1.0}[way.dtype] * {4: 1.0, 2: 0.8, 1: 0.9}[way.threads] * (1 + way.micro_batch / 8)

    best, tried = chosen(monkeypatch, seconds)
    assert best == Way("bf16", 2, 1)
    assert tried == [
        Way("fp32", 4, 8), Way("bf16", 4, 8), Way("bf16", 2, 8), Way("bf16", 1, 8), Way("bf16", 2, 4),
        Way("bf16", 2, 2), Way("bf16", 2, 1),
    ]  # fmt: skip


def test_what_is_hardly_faster_is_left(monkeypatch) -> None:
    first = Way("fp32", 4, 8)
    best, tried = chosen(monkeypatch, lambda way: 1.0 if way == first else 0.96)
    assert best == first and len(tried) == 4
    assert chosen(monkeypatch, lambda way: 1.0 if way == first else 0.94)[0] != first


def test_what_the_settings_say_is_not_tried(monkeypatch) -> None:
    train = {"batch": 8, "threads": 4, "micro_batch": 8}
    best, tried = chosen(monkeypatch, lambda way: way.micro_batch, dtype="fp32", train=train)
    assert best == Way("fp32", 4, 8) and tried == [best]
    train = {"batch": 8, "micro_batch": 8}
    assert [way.threads for way in chosen(monkeypatch, lambda way: 1.0, dtype="fp32", train=train)[1]] == [4, 2]
    monkeypatch.setattr(plan, "cpu_multiplies_bf16", lambda: False)
    assert {way.dtype for way in chosen(monkeypatch, lambda way: 1.0)[1]} == {"fp32"}


def test_beside_others_threads_are_not_tried(monkeypatch) -> None:
    clock = iter([10.0, 10.0, 11.0, 14.0])  # other processes' seconds, the clock, and both again: a quarter of a core
    monkeypatch.setattr(trial, "_others", lambda: next(clock))
    monkeypatch.setattr(trial, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    _, tried = chosen(monkeypatch, lambda way: way.threads / 100)  # quick ones: there is time to try them all
    assert {way.threads for way in tried} == {4} and len(tried) == 3


def test_a_gpu_tries_nothing_and_tells_nothing(monkeypatch) -> None:
    monkeypatch.setattr(plan, "measure", lambda *_, **__: pytest.fail("nothing is to be tried"))
    there = plan.Rehearsal(model=None, device=torch.device("cuda"), objective=None, batch=None, poll=lambda: None)
    found = choose(from_dict(Settings, {"minutes": 10.0, "dtype": "fp32"}), there, micro_batch=8)
    config, said = {}, []
    found.tell(config, said.append)
    assert (found.best, found.seconds, config, said) == (Way("fp32", 4, 8), {}, {}, [])


def test_where_the_system_does_not_say_nothing_else_runs(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(trial, "Path", lambda _: tmp_path / "stat")  # as on macOS
    assert OTHERS() == 0.0
    # user, nice, system, idle, waiting, interrupts, soft ones, stolen by other machines; guests are in user already
    (tmp_path / "stat").write_text("cpu  1000 2000 3000 77777 77777 100 200 300 55555 66666\ncpu0 1 2 3\n")
    ours = os.times()
    assert OTHERS() + ours.user + ours.system == pytest.approx(6600 / os.sysconf("SC_CLK_TCK"), abs=0.5)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not say")
def test_what_other_processes_use_is_known(monkeypatch) -> None:
    """One that works for a second adds as much; what this one works is taken off."""
    before, ours = OTHERS(), os.times()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 1: pass"], check=True)
    after = OTHERS()
    assert after - before > 0.9
    monkeypatch.setattr(os, "times", lambda: SimpleNamespace(user=ours.user + 1000, system=ours.system + 500))
    assert OTHERS() - after == pytest.approx(-1500, abs=60)


@pytest.mark.parametrize(
    "minutes, gain, works, taken",
    [(10.0, 0.5, True, True), (10.0, 0.99, True, False), (9.9, 0.5, True, False), (10.0, 0.5, False, False)],
)
def test_a_compiled_step_is_tried_before_a_long_run(monkeypatch, minutes, gain, works, taken) -> None:
    """With the best of the other ways; afterwards the model is as it was."""
    state = []
    monkeypatch.setattr(trial, "compile_blocks", lambda *_: state.append("compiled") or works)
    monkeypatch.setattr(trial, "blocks_as_written", lambda model: state.clear())
    monkeypatch.setattr(plan, "measure", lambda *args, **_: (0.1 * (args[3] + 1) * (gain if state else 1.0), 0.0))
    values = {"minutes": minutes, "dtype": "fp32", "train": {"batch": 2, "threads": 4}}
    batch = SimpleNamespace(samples=range(2), split=lambda rows: iter([rows]))
    found = choose(
        from_dict(Settings, values), rehearsal(lambda step: batch), micro_batch=2, say=print,
    )  # fmt: skip
    assert found.best == Way("fp32", 4, 1, compile=taken)
    assert (Way("fp32", 4, 1, compile=True) in found.seconds) == (works and minutes == 10.0)
    assert state == ([] if works else ["compiled"])[: minutes == 10.0]


def test_the_rows_of_a_sample_stay_together(monkeypatch) -> None:
    """A preference is two rows: of 8 pairs at most 1 at a time, 2 rows."""
    best, tried = chosen(monkeypatch, lambda way: way.micro_batch / 100, rows=16, each=2)
    assert best.micro_batch == 2 and [way.micro_batch for way in tried][-3:] == [8, 4, 2]


@pytest.mark.parametrize(
    "length, step, count",
    [
        ({"minutes": 1.9}, 1.25, 0),
        ({"minutes": 2.0}, 1.25, 1),  # 3.6 s are 3 % of it, and the three steps of a way take that
        ({"minutes": 5.0}, 1.25, 3),  # 9 s: the third way passes them
        ({"steps": 99}, 9.0, 0),  # three steps are more than 3 % of it, however long they take
        ({"steps": 100}, 1.25, 2),
        ({"steps": 900}, 0.1, 0),  # 90 s
        ({"steps": 900}, 1.25, 4),
    ],
)
def test_trying_takes_a_small_share_of_the_run(monkeypatch, length, step, count) -> None:
    """Of steps that take as long in every way; the four are the first one, and one change of each knob."""
    calls = []
    monkeypatch.setattr(plan, "measure", lambda *_, **__: calls.append(1) or (step, 0.0))
    values = {"model": {"dim": 64, "heads": 2}, "train": {"batch": 8}, **length}
    found = choose(
        from_dict(Settings, values), rehearsal(lambda step: SimpleNamespace(samples=range(8))), micro_batch=8,
    )  # fmt: skip
    assert len(calls) == count or (step < 0.2 and len(calls) == 1), "a run of 90 s is known by its first way"
    assert len(found.seconds) == count and found.best == Way("fp32", 4, 8)


def test_a_run_keeps_what_was_chosen_and_a_resumed_one_does_not_try_again(
    capsys, text: Path, tmp_path: Path, monkeypatch
):
    """Real steps, of which those with 2 threads and 4 rows are told to be the fastest."""
    measure = plan.measure

    def favouring(settings, rehearsal, dtype, micro_batch, **budget):
        seconds, scoring = measure(settings, rehearsal, dtype, micro_batch, **budget)
        favoured = (dtype == "fp32") + (torch.get_num_threads() == 2) + (micro_batch == 4)
        return seconds * 0.1**favoured, scoring

    monkeypatch.setattr(plan, "measure", favouring)
    monkeypatch.setattr(pretrain, "cores", lambda: 4)
    for name, value in (("WORTH", 0.0), ("SHARE", 99.0)):
        monkeypatch.setattr(trial, name, value)
    argv = ("--out", tmp_path, "--data", text, *TINY, "--train.batch", "8", "--train.threads", "None", "--steps", "3")
    said = train(capsys, *argv).err
    assert "tried     fp32, 4 threads, 8 at a time: 0." in said
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config["plan"][name] for name in ("dtype", "threads", "micro_batch")} == {
        "dtype": "fp32", "threads": 2, "micro_batch": 4,
    }  # fmt: skip
    assert "bf16, 4 threads, 8 at a time" in config["tried"] and "fp32, 2 threads, 2 at a time" in config["tried"]
    before = losses(tmp_path)
    resumed = train(capsys, "--resume", tmp_path, "--steps", "5")
    assert resumed.code == 0 and "tried" not in resumed.err
    plan_now = json.loads((tmp_path / "config.json").read_text())["plan"]
    assert (plan_now["dtype"], plan_now["threads"], plan_now["micro_batch"]) == ("fp32", 2, 4)
    assert losses(tmp_path)[: len(before)] == before
