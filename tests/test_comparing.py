"""`minillm finetune --method all`: a row for each method, saved as it comes, and a comparison that goes on."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from minillm.commands import comparing, series
from minillm.commands.comparing import METHODS, SCRATCH, table, variants
from minillm.commands.series import without
from minillm.loading import load
from minillm.tasks.trivial import against_trivial, sentence
from minillm.training.signals import Signals, Stopped
from tests.finetuning import FAST, base, classify_file, minillm
from tests.training.running import events


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("comparing") / "encoder", "encoder")


class Here:
    """Stands in for a process: the command runs in this one, or ends at once with `codes[name of its run]`."""

    codes: ClassVar[dict[str, int]] = {}
    begun: ClassVar[list[list[str]]] = []

    def __init__(self, command: list[str], **other: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "minillm.cli"]
        self.argv, self.where = command[3:], other["cwd"]

    def wait(self) -> int:
        from minillm.cli import run

        Here.begun.append(self.argv)
        code = Here.codes.get(Path(self.argv[-1]).name)
        with contextlib.chdir(self.where):
            return run(self.argv[0], self.argv[1:]) if code is None else code


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    monkeypatch.setattr(comparing, "get_args", lambda method: ("full", "freeze", "lora"))
    monkeypatch.setattr(series.subprocess, "Popen", Here)
    Here.codes, Here.begun = {}, []
    return Here


def test_the_options_of_each_run() -> None:
    argv = ["m", "--task", "classify", "--method", "all", "--out=x", "--overwrite", "--steps", "3"]
    assert without(argv, "--method", "--out") == ["m", "--task", "classify", "--overwrite", "--steps", "3"]
    found, common = variants("classify", argv), ["m", "--task", "classify", "--steps", "3"]
    assert list(found) == [SCRATCH, "full", "freeze", "lora", "adalora", "adapter", "prefix", "prompt"]
    assert found["full"] == [*common, "--method", "full"] and found[SCRATCH] == [*found["full"], "--from-scratch"]
    assert found["freeze"] == [*common, "--method", "freeze", "--train-only", "head"]
    given = variants("classify", [*argv, "--freeze-layers", "2"])
    assert given["freeze"] == [*common, "--method", "freeze", "--freeze-layers", "2"]
    assert given["lora"] == [*common, "--method", "lora"]
    assert variants("chat", argv)["freeze"][-2:] == ["--freeze-layers", "1"]
    assert SCRATCH not in variants("preference", argv)


def test_each_row_is_saved_as_it_comes_and_what_is_missing_is_done_on_resume(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], here: type[Here]
) -> None:
    data, out = classify_file(tmp_path / "data.jsonl"), tmp_path / "all"
    argv = ["--task", "classify", "--data", data, "--method", "all", "--out", out, "--steps", 1, *FAST]
    here.codes = {"freeze": 2, "lora": 143}
    stopped = minillm(capsys, "finetune", encoder, *argv)
    assert stopped.code == 143 and f"minillm finetune --resume {out}" in stopped.err
    assert "freeze is left out: it ended with exit code 2" in stopped.err
    assert list(json.loads((out / "methods.json").read_text())["results"]) == [SCRATCH, "full"]

    here.codes, here.begun = {"freeze": 2}, []
    done = minillm(capsys, "finetune", "--resume", out)
    assert done.code == 0 and [Path(command[-1]).name for command in here.begun] == ["freeze", "lora"]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in done.out.splitlines() if "|" in line]
    assert rows[0] == ["method", "macro f1", "loss", "accuracy", "trained", "file", "peak memory", "time"]
    assert [row[0] for row in rows[2:]] == ["from scratch", "full", "lora"]
    for row in rows[2:]:
        result = json.loads((out / row[0].replace(" ", "-") / "result.json").read_text())
        assert row[1] == f"{result['metrics']['macro_f1']:.4f}"
        assert row[4].startswith(f"{result['trained_parameters']:,} (")
        assert row[6] == f"{result['peak_bytes'] / 2**20:,.0f} MiB"

    here.begun = []
    refused = minillm(capsys, "finetune", encoder, *argv)
    assert refused.code == 2 and "already holds a comparison" in refused.err and not here.begun
    wrong = minillm(capsys, "finetune", "--resume", out, "--steps", 9)
    assert wrong.code == 2 and "it goes on with the options that it began with" in wrong.err
    here.codes = dict.fromkeys([SCRATCH, "full", "freeze", "lora"], 2)
    minillm(capsys, "finetune", encoder, *argv, "--overwrite")
    assert [command[-1] for command in here.begun] == [str(out / name) for name in here.codes]
    assert not list(out.rglob("result.json"))

    # Killed while it removed the runs that were there: what is left of them is none of its own.
    state = json.loads((out / "methods.json").read_text())
    (out / "methods.json").write_text(json.dumps(state | {"replaced": ["full"]}))
    (out / "full").mkdir(exist_ok=True)
    (out / "full" / "config.json").write_text("what was there before")
    minillm(capsys, "finetune", "--resume", out)
    assert not (out / "full" / "config.json").exists()
    assert "replaced" not in json.loads((out / "methods.json").read_text())


def test_no_method_at_all_is_an_error(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], here: type[Here]
) -> None:
    here.codes = dict.fromkeys([SCRATCH, "full", "freeze", "lora"], 2)
    argv = ["--task", "classify", "--method", "all", "--out", tmp_path / "all"]
    assert minillm(capsys, "finetune", encoder, *argv).code == 2
    (tmp_path / "all" / "methods.json").write_text('{"argv": []}')
    damaged = minillm(capsys, "finetune", "--resume", tmp_path / "all")
    assert damaged.code == 3 and "methods.json is damaged" in damaged.err


def test_a_signal_reaches_the_process_of_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It arrives while the parent waits; the child has time to save, and its end is awaited."""
    child = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
    child += "open(sys.argv[1], 'w').close(); time.sleep(60)"
    flag, found = tmp_path / "ready", []

    class Process(subprocess.Popen):
        def __init__(self, command: list[str], **other: Any) -> None:
            super().__init__([sys.executable, "-c", child, str(flag)])
            found.append(self)
            while not flag.exists():
                pass
            signal.setitimer(signal.ITIMER_REAL, 0.05)

    monkeypatch.setattr(series.subprocess, "Popen", Process)
    with Signals():
        before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
        try:
            with pytest.raises(Stopped):
                series.finish([], tmp_path / "run")
        finally:
            signal.signal(signal.SIGALRM, before)
    assert found[0].returncode == 143


def test_from_scratch_has_the_shape_and_none_of_the_weights(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, plain = classify_file(tmp_path / "data.jsonl"), load(encoder)[0].state_dict()
    common = ["--task", "classify", "--data", data, "--steps", 1, *FAST, "--optim.lr", 1e-9]
    weights = []
    for number, seed in enumerate((1, 1, 2)):
        run = tmp_path / str(number)
        assert minillm(capsys, "finetune", encoder, *common, "--from-scratch", "--seed", seed, "--out", run).code == 0
        weights.append(load(run)[0].state_dict())
    one, same, other = (w["embedding.weight"] for w in weights)
    assert weights[0].keys() == plain.keys() and one.shape == plain["embedding.weight"].shape
    assert torch.equal(one, same) and (one - other).abs().mean() > 1e-3
    assert (one - plain["embedding.weight"]).abs().mean() > 1e-3
    assert json.loads((tmp_path / "0" / "config.json").read_text())["task"]["options"]["from_scratch"] is True
    for method in (["--method", "lora"], ["--task", "preference"]):
        done = minillm(capsys, "finetune", encoder, *common, "--from-scratch", *method, "--out", tmp_path / "no")
        assert done.code == 2 and "--from-scratch trains every weight of a new model" in done.err


def test_peak_memory_is_the_processs_own() -> None:
    """A process that held 700 MB starts another one: that one's peak does not contain them."""
    child = "from minillm.machine import peak_bytes; print(peak_bytes())"
    run = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    parent = f"held = bytearray(b'1') * 700_000_000; del held; {run}"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 100e6 < int(done.stdout) < 690e6  # PyTorch with CUDA takes 514 MB to import


def test_the_table_shows_what_a_task_has() -> None:
    result = {
        "metrics": {"loss": 1.5, "rouge_l": None}, "trained_parameters": 5, "parameters": 20,
        "adapter_bytes": 4096, "peak_bytes": 3 << 20, "seconds": 61.4,
    }  # fmt: skip
    assert table({"full": result}, "rouge_l")[-1] == "| full | 1.5000 | 5 (25.0%) | 4 KiB | 3 MiB | 61 s |"
    state = {"task": "regress", "results": {"full": result | {"metrics": {"loss": 1.5, "rmse": 0.25}}}}
    head, _, row, *_ = METHODS.lines(state)  # the first column is what the task is judged by
    assert head.startswith("| method | rmse | loss |") and row.startswith("| full | 0.2500 | 1.5000 |")


def test_the_last_line_says_whether_the_trivial_answer_is_beaten(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that was not moved predicts one class or nonsense; one that learnt is right."""
    data = classify_file(tmp_path / "data.jsonl")
    common = ["--task", "classify", "--data", data, *FAST]
    for steps, lr, words in ((1, 1e-9, "It does NOT beat"), (60, 5e-3, "It beats")):
        run = tmp_path / str(steps)
        done = minillm(capsys, "finetune", encoder, *common, "--steps", steps, "--optim.lr", lr, "--out", run)
        found = json.loads((run / "result.json").read_text())
        against, baseline = found["against"], events(run, "baselines")[0]
        assert (against["metric"], against["what"]) == ("macro_f1", baseline["trivial"])
        assert against["trivial"] == baseline["macro_f1"] and against["value"] == found["metrics"]["macro_f1"]
        assert f"{words} the trivial answer ({against['what']}: macro f1 {against['trivial']:.4f})" in done.out


def test_what_has_no_trivial_answer_is_held_against_the_model_as_it_was() -> None:
    lines = [{"event": "baselines", "trivial": ""}, {"split": "val", "step": 0, "loss": 2.0}, {"step": 1, "loss": 9.0}]
    lines.append({"split": "val", "step": 2, "loss": 1.5})
    found = against_trivial("chat", lines, {"loss": 1.25})
    assert found == {"metric": "loss", "value": 1.25, "trivial": 2.0, "what": "the model as it was", "beaten": True}
    assert sentence(found) == "It beats the trivial answer (the model as it was: loss 2.0000) by 0.7500, with 1.2500."
    assert against_trivial("chat", lines, {})["value"] == 1.5
    mean = [{"event": "baselines", "trivial": "always the mean", "rmse": 3.0, "pearson": None}, lines[1]]
    worse = against_trivial("regress", mean, {"rmse": 3.5, "pearson": 0.1})
    assert not worse["beaten"] and "does NOT beat the trivial answer (always the mean: rmse 3.0000)" in sentence(worse)
    assert "nothing to hold" in sentence(against_trivial("seq2seq", lines, {"rouge_l": None}))
