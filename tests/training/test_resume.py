"""A run that is killed and resumed writes the same numbers as one that was not, bit for bit."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from minillm.cli import run as command
from minillm.training import checkpoint
from tests.training.running import ENCODER, TINY, Result, events, lines, losses, start, train, write_text

CADENCE = ["--steps", "40", "--train.eval-every", "7", "--train.save-every", "3", "--model.dropout", "0.1"]
ACCUMULATED = ["--train.micro-batch", "2", "--optim.clip", "0.5"]


@pytest.fixture(scope="module")
def reference(text: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs that nothing interrupted, one for each list of options; each resumed run is held against one of them."""
    made: dict[tuple, Path] = {}

    def get(*argv: str) -> Path:
        if argv not in made:
            run = tmp_path_factory.mktemp("reference") / "run"
            assert command("train", ["--data", str(text), "--out", str(run), *argv]) == 0
            made[argv] = run
        return made[argv]

    return get


def copy(run: Path, to: Path) -> Path:
    """The run in a folder of its own, to be damaged."""
    shutil.copytree(run, to)
    return to


def behead(run: Path, step: int) -> None:
    """Leaves a run as a kill would after the line of `step`: no end, and no checkpoint beyond it."""
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(whole) if json.loads(line).get("step") == step)
    (run / "metrics.jsonl").write_text("".join(whole[: last + 1]))
    for saved in checkpoint.steps(run):
        if saved > step:
            shutil.rmtree(run / "checkpoints" / f"step-{saved}")


def same_weights(a: Path, b: Path) -> bool:
    one, other = (checkpoint.load_weights(checkpoint.resolve(run)) for run in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def kill_until_it_ends(text: Path, run: Path, argv: list[str], kills: list[int]) -> None:
    """Starts the run and kills it once it has written as many lines as each of `kills` says; resumes it after each."""
    process, draw = start("--data", text, "--out", run, *argv), random.Random(time.time_ns())
    for count in kills:
        while process.poll() is None and (
            not (path := run / "metrics.jsonl").exists() or path.read_text().count("\n") < count
        ):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = start("--resume", run)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 0, err


@pytest.mark.parametrize("model, kills", [(TINY, [12, 33]), (ENCODER, [21])], ids=["next-token", "masked"])
def test_killed_without_warning(model, kills, text: Path, tmp_path: Path, reference) -> None:
    """At moments that are different each time: within some steps of the lines named, in a step or while saving."""
    argv = (*model, *CADENCE, *ACCUMULATED)
    kill_until_it_ends(text, tmp_path / "run", list(argv), kills)
    assert losses(tmp_path / "run") == losses(reference(*argv))
    assert same_weights(tmp_path / "run", reference(*argv))


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_many_random_moments(seed: int, text: Path, tmp_path: Path, reference) -> None:
    argv = (*(TINY, ENCODER)[seed % 2], *CADENCE, *ACCUMULATED)
    kills = sorted(random.Random(seed).sample(range(52), 4))
    kill_until_it_ends(text, tmp_path / "run", list(argv), kills)
    assert losses(tmp_path / "run") == losses(reference(*argv))
    assert same_weights(tmp_path / "run", reference(*argv))


@pytest.fixture
def whole(reference, tmp_path: Path) -> tuple[Path, Path]:
    """(a finished run, a copy of it)"""
    expected = reference(*TINY, *CADENCE, *ACCUMULATED)
    return expected, copy(expected, tmp_path / "run")


def resume(capsys, run: Path, *argv: str) -> Result:
    return train(capsys, "--resume", run, *argv)


def test_resumed_twice_in_a_row(capsys, whole) -> None:
    expected, run = whole
    behead(run, 39)
    assert checkpoint.steps(run) == [39]
    for _ in range(2):
        behead(run, 39)
        assert resume(capsys, run).code == 0
        assert losses(run) == losses(expected) and same_weights(run, expected)


def test_killed_before_its_first_checkpoint(capsys, whole) -> None:
    expected, run = whole
    behead(run, 2)
    shutil.rmtree(run / "checkpoints")
    result = resume(capsys, run)
    assert result.code == 0 and "the start: it has no checkpoint yet" in result.err
    assert losses(run) == losses(expected) and same_weights(run, expected)
    assert len(events(run, "baselines")) == 1 and len(events(run, "sample")) == 3


def test_killed_before_its_data_was_ready(capsys, whole) -> None:
    """Only config.json is there, as the first thing written."""
    expected, run = whole
    config = json.loads((run / "config.json").read_text())
    shutil.rmtree(run)
    run.mkdir()
    kept = {name: config[name] for name in ("format", "settings", "versions", "options")}
    (run / "config.json").write_text(json.dumps(kept))
    assert resume(capsys, run).code == 0
    assert losses(run) == losses(expected)
    again = json.loads((run / "config.json").read_text())
    measured = ("seconds_per_step", "seconds_per_validation", "seconds_per_sample", "predicted_seconds")
    for plan in (again["plan"], config["plan"]):
        for name in measured:
            plan.pop(name, None)
    assert again == config


def test_a_finished_run_stays_as_it_is(capsys, whole) -> None:
    _, run = whole
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = resume(capsys, run)
    assert result.code == 0 and "is finished (finished after 40 steps)" in result.err and "Traceback" not in result.err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_that_was_killed_between_its_end_and_its_report_gets_it(capsys, whole) -> None:
    expected, run = whole
    report, page = run / "report.html", (expected / "report.html").read_text().replace(str(expected), str(run))
    report.unlink()
    result = resume(capsys, run)
    assert result.code == 0 and f"report: {report}" in result.err and "is finished" in result.err
    assert report.read_text() == page
    report.write_text("what it was at an earlier end")
    os.utime(report, (1, 1))
    assert resume(capsys, run).code == 0 and report.read_text() == page


def test_a_finished_run_goes_on_with_more_steps(capsys, whole) -> None:
    expected, run = whole
    assert resume(capsys, run, "--steps", "44").code == 0
    assert losses(run)[: len(losses(expected))] == losses(expected)
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 45))
    assert events(run, "end")[-1]["step"] == 44 and len(events(run, "end")) == 1
    assert resume(capsys, run).err.count("is finished (finished after 44 steps)") == 1


def test_a_last_line_that_was_cut(capsys, whole) -> None:
    expected, run = whole
    behead(run, 39)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "tokens": 2560, "sec')
    assert resume(capsys, run).code == 0
    assert losses(run) == losses(expected)


def test_a_damaged_newest_checkpoint(capsys, whole) -> None:
    expected, run = whole
    behead(run, 39)
    shutil.copytree(run / "checkpoints" / "step-39", run / "checkpoints" / "step-42")  # as if it were the newest
    file = run / "checkpoints" / "step-42" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    result = resume(capsys, run)
    (warning,) = [line for line in result.err.splitlines() if line.startswith("warning")]
    assert str(file) in warning
    assert result.code == 0 and "goes on from step-39" in result.err
    assert losses(run) == losses(expected) and same_weights(run, expected)


def test_a_changed_corpus_is_refused(capsys, text: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    shutil.copy(text, own)
    run = tmp_path / "run"
    assert train(capsys, "--data", own, "--out", run, *TINY, "--steps", "2").code == 0
    behead(run, 1)
    before = (run / "metrics.jsonl").read_bytes()
    with own.open("a") as file:
        file.write("x")
    result = resume(capsys, run)
    assert result.code == 2 and result.err.count("\n") == 2
    assert f"error: the text of {own} has changed since {run} began; restore it" in result.err
    assert (run / "metrics.jsonl").read_bytes() == before
    own.unlink()
    result = resume(capsys, run)
    assert result.code == 2 and f"error: {own} does not exist" in result.err


@pytest.mark.parametrize("option", [["--seed", "3"], ["--optim.lr", "1"], ["--out", "x"], ["--minutes", "1"]])
def test_no_other_option_goes_with_resume(capsys, whole, option: list[str]) -> None:
    _, run = whole
    result = resume(capsys, run, *option)
    assert result.code == 2 and option[0] in result.err and "Traceback" not in result.err


def test_the_allowed_options_are_taken(capsys, whole) -> None:
    expected, run = whole
    behead(run, 39)
    assert resume(capsys, run, "--device", "cpu", "--steps", "40").code == 0
    assert losses(run) == losses(expected)


def test_what_is_no_run_is_refused(capsys, whole, tmp_path: Path) -> None:
    _, run = whole
    for path, message in [
        (tmp_path / "nothing", "holds no run"),
        (run / "checkpoints" / "step-40", f"step-40 is a checkpoint; give the folder of its run: {run}"),
        (run / "checkpoints" / "best", f"best is a checkpoint; give the folder of its run: {run}"),
    ]:
        result = resume(capsys, path)
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    config = json.loads((run / "config.json").read_text())
    (run / "metrics.jsonl").unlink()
    del config["plan"]["micro_batch"]
    for damaged in (json.dumps(config), '{"settings": '):
        (run / "config.json").write_text(damaged)
        result = resume(capsys, run)
        assert result.code == 3 and f"{run / 'config.json'} is damaged" in result.err.splitlines()[-1]


def test_at_an_epoch_boundary(capsys, tmp_path: Path) -> None:
    """Ten samples an epoch and five a step: step 2 ends an epoch exactly, and the run is resumed there."""
    small = write_text(tmp_path / "small.txt", sentences=4)
    argv = [
        "--data",
        small,
        *TINY,
        "--train.batch",
        "5",
        "--train.save-every",
        "1",
        "--train.keep",
        "99",
        "--steps",
        "9",
    ]
    first = tmp_path / "first"
    assert train(capsys, *argv, "--out", first).code == 0
    per_epoch = 5 / lines(first, "train")[0]["epoch"]
    boundary = next(step for step in range(1, 10) if step * 5 % per_epoch == 0 or step * 5 > per_epoch)
    for step in (boundary - 1, boundary):
        run = copy(first, tmp_path / f"from-{step}")
        behead(run, step)
        assert resume(capsys, run).code == 0
        assert losses(run) == losses(first) and lines(run, "train")[-1]["epoch"] > 1
