"""The default run of each task: what is run, what is kept, and the README's table."""

import json
from pathlib import Path

import pytest

from benchmarks import finetuning, records, tables, tasks
from benchmarks.__main__ import main

AGAINST = {"metric": "rouge_l", "value": 0.5, "trivial": 0.25, "what": "the source itself", "beaten": True}


def test_each_task_from_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def minillm(*argv: str) -> str:
        asked.append(list(argv))
        run = Path(argv[-1])
        run.mkdir(parents=True, exist_ok=True)
        result = {"steps": 4, "best_step": 3, "cpu_seconds": 2.0, "peak_bytes": 1 << 20, "against": AGAINST}
        (run / "result.json").write_text(json.dumps(result))
        (run / "config.json").write_text(json.dumps({"corpus": {"documents": 12}, "plan": {"threads": 2}}))
        return ""

    monkeypatch.setattr(tasks, "minillm", minillm)
    monkeypatch.setattr(finetuning, "minillm", minillm)
    work, out, decoder = tmp_path / "work", tmp_path / "out", tmp_path / "decoder"
    argv = ["tasks", "--work", str(work), "--out", str(out), "--decoder", str(decoder)]
    assert main([*argv, "--task", "tag", "--task", "chat"]) == 0
    assert [command[:2] for command in asked] == [
        ["train", "--preset"], ["finetune", str(work / "mlm-tiny")], ["finetune", str(decoder)]
    ]  # fmt: skip
    assert asked[2][2:] == ["--task", "chat", "--overwrite", "--out", str(work / "chat")]
    assert main([*argv, "--task", "tag"]) == 0 and asked[3] == ["train", "--resume", str(work / "mlm-tiny")]
    rows = records.load(out / "tasks.json")
    assert [row["task"] for row in rows] == ["chat", "tag"] and rows[0]["examples"] == 12
    assert all(row["seconds"] > 0 and row["beaten"] for row in rows)


def test_an_unknown_task_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "--task", "poetry", "--out", str(tmp_path)]) == 2
    assert "--task poetry: there are classify, regress" in capsys.readouterr().err


def test_the_table(tmp_path: Path) -> None:
    about = {"device": "EPYC", "versions": {"torch": "2.13.0"}, "date": "2026-01-02", "load": 2.5, "quick": False}
    row = {"task": "seq2seq", "base": "default", "examples": 3000, "seconds": 90.0, "threads": 2, **AGAINST, **about}
    records.save(tmp_path / "tasks.json", [row])
    text = tables.rewritten("<!-- table:tasks -->\n<!-- /table -->\n", tmp_path).splitlines()
    assert "| seq2seq | `default` | 3,000 | 1.5 min | rouge l 0.500 | 0.250 (the source itself) |" in text
    assert "EPYC, 2 threads, load up to 2.5. torch 2.13.0; 2026-01-02." in text
