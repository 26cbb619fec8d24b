"""The comparison of finetuning methods: which runs it makes, what it keeps of them, and the README's table."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import finetuning, records, tables
from benchmarks.__main__ import main

LABELS = {"train": ["good"] * 6 + ["bad"] * 3, "dev": ["bad", "good"], "test": ["good", "good", "bad", "neutral"]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, labels in LABELS.items():
        rows = [json.dumps({"text": f"{split} {n} ☃", "label": label}) for n, label in enumerate(labels)]
        (tmp_path / f"sst3-{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of minillm: what it was asked, and results that depend on method and seed."""
    asked: list[list[str]] = []

    def finish(argv: list[str], run: Path) -> int:
        asked.append([*argv, str(run)])
        if run.name.startswith("prompt") and len(asked) < 12:
            return 1
        run.mkdir()
        scores = {"loss": 1.0, "accuracy": 0.25, "macro_f1": 0.2, "confusion": [[1]]}
        sizes = {"trained_parameters": 10, "parameters": 40, "adapter_bytes": 2048, "peak_bytes": 3 << 20}
        times = {"cpu_seconds": 9.0, "steps": 4, "best_step": 3}
        (run / "result.json").write_text(json.dumps({"metrics": scores, **sizes, **times}))
        return 0

    def minillm(*argv: str) -> str:
        asked.append(list(argv))
        seed = int(argv[1].split("-")[-2]) if argv[0] == "evaluate" else 0
        return json.dumps({"loss": 0.5, "accuracy": 0.5 + seed / 100, "macro_f1": 0.4, "examples": 4})

    monkeypatch.setattr(finetuning, "finish", finish)
    monkeypatch.setattr(finetuning, "minillm", minillm)
    return asked


def test_every_method_once_and_what_is_compared_three_times(
    data: Path, commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "results"
    argv = ["finetuning", "--data", str(data), "--work", str(work), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "SEEDS", {"from-scratch": (1, 2)})
        patch.setattr(finetuning, "variants", lambda task, options: {"full": options, "from-scratch": [*options, "s"]})
        assert main(argv) == 0
    assert commands[0][0] == "train" and commands[0][-4:-2] == ["--data", str(work / "sentences.jsonl")]
    sentences = [json.loads(line) for line in (work / "sentences.jsonl").read_text().splitlines()]
    assert sentences == [{"text": f"train {n} ☃"} for n in range(9)]  # no label, nothing of dev or test
    runs = [Path(command[-1]).name.rpartition("-")[0] for command in commands[1:] if command[0] != "evaluate"]
    assert runs == ["from-scratch-1", "from-scratch-2", "full-1"]
    assert commands[5][-5:-1] == ["--optim.lr", "1e-3", "--seed", "1"]  # full, at the rate of from scratch
    assert commands[1][-4:-1] == ["s", "--seed", "1"] and f"{data}/sst3-dev.jsonl" in commands[1]
    assert not any("sst3-test" in word for command in commands if command[0] != "evaluate" for word in command)
    rows = records.load(out / "finetuning.json")
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("majority", 0), ("from-scratch", 1), ("from-scratch", 2), ("full", 1)
    ]  # fmt: skip
    assert rows[0]["test"] == {"accuracy": 0.5, "macro_f1": pytest.approx(2 / 9)}  # F1 of 2/3, 0 and 0
    assert rows[2]["test"] == {"loss": 0.5, "accuracy": 0.52, "macro_f1": 0.4} and rows[2]["dev"]["accuracy"] == 0.25
    assert rows[1]["cpu_seconds"] == 9.0 and rows[1]["peak_bytes"] == 3 << 20


def test_a_stopped_comparison_goes_on(
    data: Path, commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["finetuning", "--data", str(data), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "results")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "SEEDS", {})
        patch.setattr(finetuning, "variants", lambda task, options: {"full": options, "prompt": options})
        assert main(argv) == 2
        assert re.search(r"prompt-1-[0-9a-f]{8} ended with exit code 1", capsys.readouterr().err)
        path = tmp_path / "results" / "finetuning.json"
        assert [row["method"] for row in records.load(path)] == ["majority", "full"]
        commands += [["filler"]] * 8
        assert main(argv) == 0 and [Path(command[-1]).name[:6] for command in commands[-2:]] == ["prompt", "--json"]
        assert {row["method"] for row in records.load(path)} == {"majority", "full", "prompt"}
        count = len(commands)
        assert main(argv) == 0 and [command[0] for command in commands[count:]] == ["train"]  # nothing is run twice
        patch.setattr(finetuning, "TUNE", ["--epochs", "1"])
        main(argv)
        assert len(commands) == count + 1 + 1 + 2 * 2  # other settings: all anew


def test_missing_sentences_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetuning", "--data", str(tmp_path)]) == 2
    assert "sst3-test.jsonl missing: --data names the folder" in capsys.readouterr().err


def test_the_table_has_means_and_deviations(tmp_path: Path) -> None:
    about = {"device": "EPYC, 2 cores", "versions": {"torch": "2.13.0"}, "date": "2026-01-02", "quick": False}
    about |= {"examples": 2210, "recipe": []}
    sizes = {"trained_parameters": 10, "parameters": 40, "adapter_bytes": 2048, "peak_bytes": 3 << 20}
    made = [{"method": "majority", "seed": 0, "test": {"accuracy": 0.5, "macro_f1": 0.25}, **about}]
    for seed, score in ((1, 0.5), (2, 0.6)):
        test = {"accuracy": score, "macro_f1": 0.5}
        made.append({"method": "from-scratch", "seed": seed, "test": test, "cpu_seconds": 9.0 * seed, **sizes, **about})
    made.append({**made[1], **sizes, "method": "prompt", "cpu_seconds": None})
    made.insert(0, {**made[1], "method": "full", "quick": True})
    records.save(tmp_path / "finetuning.json", made)
    text = tables.rewritten("<!-- table:finetuning -->\n<!-- /table -->\n", tmp_path).splitlines()
    assert "| majority | 0.250 | 0.500 | – | – | – | – |" in text
    assert "| from scratch | 0.500 ± 0.000 | 0.550 ± 0.071 | 10 (25.0%) | 2 KiB | 3 MiB | 14 |" in text
    assert "| prompt | 0.500 | 0.500 | 10 (25.0%) | 2 KiB | 3 MiB | – |" in text
    assert not any(line.startswith("| full") for line in text)  # measured with --quick alone
    assert any(line.startswith("2,210 test sentences; ± is the standard deviation over 2 seeds") for line in text)
