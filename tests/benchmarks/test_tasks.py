"""The default run of each task: what is run, what is kept, and the README's table."""

from pathlib import Path

import pytest

from benchmarks import records, tables
from benchmarks.__main__ import main
from tests.benchmarks.made import ABOUT, AGAINST, Commands


def test_each_task_from_its_base(commands: Commands, tmp_path: Path) -> None:
    work, out, decoder = tmp_path / "work", tmp_path / "out", tmp_path / "decoder"
    argv = ["tasks", "--work", str(work), "--out", str(out), "--decoder", str(decoder)]
    assert main([*argv, "--task", "tag", "--task", "chat"]) == 0
    asked = commands.asked
    assert [command[:2] for command in asked] == [
        ["train", "--preset"], ["finetune", str(work / "mlm-tiny")], ["finetune", str(decoder)]
    ]  # fmt: skip
    assert asked[2][2:] == ["--task", "chat", "--overwrite", "--out", str(work / "chat")]
    assert main([*argv, "--task", "tag"]) == 0 and asked[3] == ["train", "--resume", str(work / "mlm-tiny")]
    rows = records.load(out / "tasks.json")
    assert [row["task"] for row in rows] == ["chat", "tag"] and rows[0]["examples"] == 12
    assert all(row["seconds"] > 0 and row["beaten"] for row in rows)
    assert main([*argv, "--task", "tag", "--quick"]) == 0
    assert asked[5][:2] == ["train", "--preset"], "a base of two steps is none for a full measurement, nor the reverse"
    assert [(row["task"], row["quick"]) for row in records.load(out / "tasks.json")][2:] == [("tag", True)]


def test_an_unknown_task_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "--task", "poetry", "--out", str(tmp_path)]) == 2
    assert "--task poetry: there are classify, regress" in capsys.readouterr().err


def test_the_table(tmp_path: Path) -> None:
    about = {**ABOUT, "device": "EPYC", "load": 2.5}
    row = {"task": "seq2seq", "base": "default", "examples": 3000, "seconds": 90.0, "threads": 2, **AGAINST, **about}
    records.save(tmp_path / "tasks.json", [row])
    text = tables.rewritten("<!-- table:tasks -->\n<!-- /table -->\n", tmp_path).splitlines()
    assert "| seq2seq | `default` | 3,000 | 1.5 min | ROUGE-L 0.500 | 0.250 (the source itself) |" in text
    assert "EPYC, 2 threads, load up to 2.5. torch 2.13.0; 2026-01-02." in text
