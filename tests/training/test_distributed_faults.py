"""A rank that dies, stalls or raises ends the whole run, which names it; a signal to one stops all, who save once."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from minillm.cli import run as command
from minillm.commands.launching import earlier_run, launch
from minillm.training import checkpoint
from minillm.training.distributed import Alone
from tests.training.ranks import Ranks, commanded, misbehaving, obstructed, poisoned, resumed, stopped, trained
from tests.training.running import ROOT, TINY, events, losses, metrics, train
from tests.training.saving import same

VALUES = {"steps": 6, "train": {"batch": 6}}
SIGN = '"reason": "signal"'
IMPATIENT = {"steps": 6, "train": {"batch": 6, "stall_seconds": 4.0}}


@pytest.mark.parametrize(
    "what, said",
    [
        ("is killed", "rank 1 .*gives no sign of life"),
        pytest.param("is stopped", "rank 1 .*gives no sign of life", marks=pytest.mark.prove),
        ("stalls", "rank 1 .*stalls: the others have waited"),
        ("raises", "rank 1 .*failed: LookupError: no such token"),
    ],
)
def test_a_rank_that_fails_ends_the_run_by_name(tmp_path: Path, what: str, said: str) -> None:
    begun = time.monotonic()
    terminal = tmp_path / "terminal"
    ranks = Ranks(3, misbehaving, tmp_path, what, IMPATIENT, terminal=terminal)
    if what == "is stopped":
        for process in (ranks.processes[0], ranks.processes[2]):
            process.join(60)
        ranks.processes[1].kill()  # as torchrun does with what does not end
    codes = ranks.codes()
    assert time.monotonic() - begun < 60
    assert codes[0] == codes[2] == 1 and codes[1] == (-9 if what in ("is killed", "is stopped") else 1)
    found = [line for line in terminal.read_text().splitlines() if line.startswith("error:")]
    assert len(found) == 1 and re.search(said, found[0]), terminal.read_text()
    log = (tmp_path / "logs" / "rank-1.log").read_text()
    if what == "stalls":
        assert "this rank stood at" in log and "time.sleep(600)" in log
    if what == "raises":
        assert "LookupError: no such token" in log
    assert not events(tmp_path, "end")


def test_sigterm_to_one_stops_all_and_saves_once(tmp_path: Path) -> None:
    ranks = Ranks(2, misbehaving, tmp_path, "gets SIGTERM", VALUES)
    assert ranks.codes() == [143, 143]
    assert checkpoint.steps(tmp_path) == [3], "the step in hand is finished by all"
    assert [event["reason"] for event in events(tmp_path, "end")] == ["signal"]
    assert SIGN in (tmp_path / "metrics.jsonl").read_text().splitlines()[-1], "README says to look for it there"
    *_, again = Ranks(2, resumed, tmp_path, VALUES).results()[0]
    assert again == Ranks(2, trained, tmp_path / "whole", VALUES).results()[0]
    assert SIGN not in (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]


def test_a_run_killed_twice_ends_as_one_that_never_was(tmp_path: Path) -> None:
    """Once before its first checkpoint is whole, once while the next one may be written: the same bits in the end."""
    values = {"steps": 6, "train": {"batch": 6, "save_every": 2, "parallel": "fsdp"}}
    run, one = tmp_path / "run", tmp_path / "one"
    for at in (1, 4):
        ranks = Ranks(2, misbehaving, run, "is killed", values, at)
        ranks.processes[1].join(60)
        ranks.processes[0].kill()  # as torchrun does, who need not wait for it to find out
        assert ranks.codes() == [-9, -9]
    for folder in (run, one):
        assert Ranks(2, misbehaving, folder, "", values, None).codes() == [0, 0]
    assert losses(run) == losses(one)
    assert same(*(checkpoint.load_weights(checkpoint.resolve(folder)) for folder in (run, one)))


def test_what_is_not_finite_on_one_rank_ends_all_before_a_weight_moves(tmp_path: Path) -> None:
    """All say the same: the rank whose rows are sound has met no more than the others' gradient."""
    values = {"train": {"batch": 6, "save_every": 1, "parallel": "fsdp"}}
    found = Ranks(2, poisoned, tmp_path, 10, values).results()
    expected = "step 2: the loss is not finite, first at loss, samples 10; the weights are unchanged"
    assert all(message.startswith(expected) for message, _ in found), found
    assert same(found[0][1], checkpoint.load_weights(checkpoint.resolve(tmp_path)))
    assert checkpoint.steps(tmp_path) == [1] and len(events(tmp_path, "nonfinite")) == 1


def test_parts_that_cannot_be_written_end_the_run_in_one_line(text: Path, tmp_path: Path) -> None:
    """They are written while training goes on: it is noticed before the next checkpoint, or at the end."""
    terminal, run = tmp_path / "terminal", tmp_path / "run"
    argv = ["--data", str(text), "--out", str(run), *TINY, "--steps", "2", "--train.parallel", "fsdp"]
    assert Ranks(2, obstructed, argv, terminal=terminal).results() == [2, 2], terminal.read_text()
    said = terminal.read_text().splitlines()
    assert said[-1].startswith("error: ") and said[-1].endswith("step-1.tmp/parts: File exists"), said[-1]
    assert "Traceback" not in terminal.read_text()
    assert not events(run, "end") and list((run / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "who, where", [(0, "minillm.commands.corpus.run_shards"), (1, "minillm.training.pretrain.make_plan")]
)
def test_a_stop_of_one_before_training_is_one_of_all(capsys, text: Path, tmp_path: Path, who: int, where: str) -> None:
    """While the lead makes the data and the other waits for it; while both measure. Resumed, it is as never stopped."""
    run, one = tmp_path / "run", tmp_path / "one"
    argv = ["--data", str(text), *TINY, "--steps", "3"]
    terminal = tmp_path / "terminal"
    ranks = Ranks(2, stopped, [*argv, "--out", str(run)], who, where, terminal=terminal)
    assert ranks.codes() == [143, 143], terminal.read_text()
    assert "stopped" in terminal.read_text() and "error" not in terminal.read_text()
    assert not (run / "metrics.jsonl").exists()
    if who:
        return
    assert Ranks(2, commanded, ["--resume", str(run)]).results() == [0, 0]
    assert train(capsys, *argv, "--out", one).code == 0
    assert [line[:2] for line in losses(run)] == [line[:2] for line in losses(one)]
    assert [line[2] for line in losses(run)] == pytest.approx([line[2] for line in losses(one)], rel=1e-5)


@pytest.mark.parametrize("signalled, code, again", [(True, 1, True), (True, 0, False), (False, 1, False)])
def test_a_slurm_job_queues_itself_again_after_a_signal_alone(
    tmp_path: Path, signalled: bool, code: int, again: bool
) -> None:
    """The template with commands of Slurm's names that write down how they were called: no cluster is here.

    A run that fails as it is resumed does not queue itself again, though the last job's end is what its file ends with.
    """
    run = tmp_path / "runs" / "big"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(f"{{{SIGN}}}\n")
    until_stopped = (
        f"trap 'exit {code}' TERM; echo $$ > step; kill -USR1 $PPID; for i in $(seq 200); do sleep 0.05; done"
    )
    for name, body in {
        "srun": f'echo "$@" >> calls; {until_stopped if signalled else f"exit {code}"}',
        "scancel": 'echo "scancel $@" >> calls; kill -TERM $(cat step)',
        "scontrol": "if [ $1 = show ]; then echo host0; else echo $@ >> calls; fi",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host[0-1]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    variables = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for begun in (False, True):
        job = subprocess.run(["bash", ROOT / "docs" / "train.slurm"], cwd=tmp_path, env=variables, timeout=20)
        first, *rest = (tmp_path / "calls").read_text().splitlines()
        assert ("--resume runs/big" in first) == begun and ("--out runs/big --preset gpt2" in first) != begun
        assert "--nnodes 2 --node-rank $SLURM_NODEID --nproc-per-node 8" in first and "--master-addr host0" in first
        expected = ["scancel --signal=TERM 7"] if signalled else []
        assert rest == expected + (["requeue 7"] if again else []) and job.returncode == (0 if again else code)
        (tmp_path / "calls").unlink()
        (run / "config.json").write_text("{}")


def test_sigusr1_to_one_saves_and_all_go_on(tmp_path: Path) -> None:
    ranks = Ranks(2, misbehaving, tmp_path, "gets SIGUSR1", VALUES)
    assert ranks.codes() == [0, 0]
    assert checkpoint.steps(tmp_path) == [3, 6]


def test_a_second_attempt_goes_on_with_the_run_of_the_first(capsys, text: Path, tmp_path: Path, monkeypatch) -> None:
    """As torchrun --max-restarts starts it again: the same command, and the same folder for errors."""
    out = tmp_path / "run"
    argv = ("--data", text, "--out", out, *TINY, "--steps", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none_abc" / "attempt_0" / "0" / "error.json"))
    assert train(capsys, *argv).code == 0 and json.loads((out / "config.json").read_text())["launch"] == "none_abc"
    assert earlier_run(str(out)) is None, "a first attempt begins anew"
    assert train(capsys, *argv).code == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert earlier_run(str(out)) == out
    result = train(capsys, *argv)
    assert result.code == 0 and "is finished" in result.err
    (tmp_path / "runs").mkdir()
    out.rename(tmp_path / "runs" / "one")
    monkeypatch.chdir(tmp_path)
    assert earlier_run(None) == Path("runs/one")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none_xyz" / "attempt_1" / "0" / "error.json"))
    assert earlier_run("runs/one") is None, "the run of another start"
    assert launch() == {"launch": "none_xyz"}


@pytest.mark.parametrize(
    "kind, line", [(bool, "run is not seen by all machines"), (str, "text.txt does not hold the same on all machines")]
)
def test_machines_that_do_not_share_their_folders_do_not_train(
    capsys, text: Path, tmp_path: Path, monkeypatch, kind: type, line: str
) -> None:
    """Another rank does not see the run folder, or reads another text: it would go its own way."""

    class Elsewhere(Alone):
        def gather(self, value: Any) -> list[Any]:
            return [value, kind() if isinstance(value, kind) else value]

    monkeypatch.setattr("minillm.commands.train.join", lambda: nullcontext(Elsewhere()))
    result = train(capsys, "--data", text, "--out", tmp_path / "run", *TINY, "--steps", "1")
    assert result.code == 2 and line in result.err.splitlines()[-1]


def test_other_commands_refuse_to_run_twice(capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("generate", ["nowhere", "--prompt", "x"]) == 2
    assert "runs in one process, not in 2" in capsys.readouterr().err


def torchrun(*argv: object) -> subprocess.Popen[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*start, *map(str, argv)], cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(run: Path, step: int) -> None:
    for _ in range(1200):
        if (run / "metrics.jsonl").exists() and any(line.get("step", 0) >= step for line in metrics(run)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{run} does not come to step {step}")


def ranks_of(agent: subprocess.Popen[str]) -> list[int]:
    """Process ids of torchrun's children that train, in the order in which it started them."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(agent.pid)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "train.py" in line]


@pytest.mark.prove
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_brings_a_run_killed_at_ten_points_to_the_same_end(text: Path, tmp_path: Path, parallel: str) -> None:
    """Either rank, at any moment from its start on; twenty points with both ways of sharing."""
    argv = ["--data", text, *TINY, "--steps", "300", "--train.save-every", "10", "--train.parallel", parallel]
    argv += ["--model.dropout", "0.1"]
    whole = torchrun("train.py", "--out", tmp_path / "whole", *argv)
    assert whole.communicate(timeout=300) and whole.returncode == 0
    agent = torchrun("--max-restarts", "10", "train.py", "--out", tmp_path / "run", *argv)
    chance, gone = random.Random(parallel), set[int]()
    for step in sorted(chance.sample(range(280), 10)):
        wait_for(tmp_path / "run", step)
        while len(living := set(ranks_of(agent)) - gone) < 2:
            time.sleep(0.1)
        time.sleep(chance.random())
        os.kill(chance.choice(sorted(living)), signal.SIGKILL)
        gone |= living
    _, err = agent.communicate(timeout=300)
    assert agent.returncode == 0, err
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    folders = [checkpoint.resolve(tmp_path / name) for name in ("run", "whole")]
    assert same(*(checkpoint.load_weights(folder) for folder in folders))


@pytest.mark.prove
def test_sigterm_to_torchrun_saves_once(text: Path, tmp_path: Path) -> None:
    argv = ["--data", text, *TINY, "--steps", "2000", "--train.save-every", "2000", "--out", tmp_path / "run"]
    agent = torchrun("train.py", *argv)
    wait_for(tmp_path / "run", 5)
    agent.send_signal(signal.SIGTERM)
    _, err = agent.communicate(timeout=120)
    assert agent.returncode == 1 and "SignalException" in err, "as README says; it is torchrun's"
    assert err.count("saved step") == 1 and len(checkpoint.steps(tmp_path / "run")) == 1
    assert [event["reason"] for event in events(tmp_path / "run", "end")] == ["signal"]
