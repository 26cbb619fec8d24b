"""A run's folder: metrics.jsonl when it goes on, each line once; one run replaced by another, in one at a time."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.config import UserError
from minillm.training import run as runs
from minillm.training.run import Metrics, clear_run, cut_metrics, held, new_run, read_config, read_metrics

LINES = [
    {"event": "baselines"},
    {"step": 2, "split": "train"},
    {"step": 2, "split": "val"},
    {"event": "sample", "step": 2},
    {"step": 3, "split": "train"},
    {"event": "end", "step": 3},
]


@pytest.mark.parametrize("chores_done, kept", [(True, LINES[:4]), (False, LINES[:2])])
def test_back_to_what_was_known_at_a_step(tmp_path: Path, chores_done: bool, kept: list[dict]) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    cut_metrics(tmp_path, 2, chores_done=chores_done)
    assert read_metrics(tmp_path) == kept


def test_a_cut_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"event": "base')
    metrics = Metrics(tmp_path)
    metrics.write(step=2)
    metrics.close()
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def small_run(folder: Path) -> set[str]:
    """Files like a run's, and one that is somebody's; the names of the run's."""
    folder.mkdir()
    (folder / "config.json").write_text('{"settings": {}}')
    (folder / "metrics.jsonl").write_text('{"event": "end", "step": 2, "reason": "finished"}\n')
    for name in ("checkpoints/step-1", "checkpoints/step-2", "tokenizer", "data"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    ours = {path.name for path in folder.iterdir()}
    (folder / "notes.txt").write_text("mine")
    return ours


KILLED = """
import os, signal, sys
from pathlib import Path
from minillm.training.run import clear_run

left = int(sys.argv[2])

def counting(function):
    def call(*args, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*args, **options)
    return call

for name in ("mkdir", "rename", "unlink", "rmdir"):  # all that changes a folder
    setattr(os, name, counting(getattr(os, name)))
clear_run(Path(sys.argv[1]))
"""


def test_a_run_that_is_being_replaced_is_whole_or_no_run(tmp_path: Path) -> None:
    """Killed before each change that removing it makes to the disk: what is left never passes for a whole run."""
    for changes in range(40):
        folder = tmp_path / str(changes)
        ours = small_run(folder)
        killed = subprocess.run(
            [sys.executable, "-S", "-c", KILLED, folder, str(changes)], cwd=Path(__file__).parents[2]
        )
        there = {path.name for path in folder.iterdir()}
        if "config.json" in there:
            assert ours <= there
            clear_run(folder)
        elif killed.returncode:
            with pytest.raises(UserError, match=f"{folder} holds no run: its last one was being removed; begin one"):
                read_config(folder)
            assert new_run(str(folder), "name", overwrite=False) == folder
        assert [path.name for path in folder.iterdir()] == ["notes.txt"]
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL
    assert changes > 10 and killed.returncode == 0


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_PATIENCE", 0.0)
    ours = small_run(tmp_path / "run")
    with held(tmp_path / "run"):
        for attempt in (
            lambda: new_run(str(tmp_path / "run"), "name", overwrite=True),
            held(tmp_path / "run").__enter__,
        ):
            with pytest.raises(UserError, match=r"another process is training in .*run; wait for its end, stop it"):
                attempt()
    assert ours <= {path.name for path in (tmp_path / "run").iterdir()}
    with held(tmp_path / "run"):
        pass
