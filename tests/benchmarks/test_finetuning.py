"""The comparison of finetuning methods: which runs it makes, what it keeps of them, and the README's table."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import finetuning, records, tables
from benchmarks.__main__ import main
from tests.benchmarks.made import ABOUT, SIZES, Commands

LABELS = {"train": ["good"] * 6 + ["bad"] * 3, "dev": ["bad", "good"], "test": ["good", "good", "bad", "neutral"]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, labels in LABELS.items():
        rows = [json.dumps({"text": f"{split} {n} ☃", "label": label}) for n, label in enumerate(labels)]
        (tmp_path / f"sst3-{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def test_every_method_once_and_what_is_compared_three_times(
    data: Path, commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "results"
    argv = ["finetuning", "--data", str(data), "--work", str(work), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "SEEDS", {"from-scratch": (1, 2)})
        patch.setattr(finetuning, "variants", lambda task, options: {"full": options, "from-scratch": [*options, "s"]})
        assert main(argv) == 0
    asked = commands.asked
    assert asked[0][0] == "train" and asked[0][-4:-2] == ["--data", str(work / "sentences.jsonl")]
    sentences = [json.loads(line) for line in (work / "sentences.jsonl").read_text().splitlines()]
    assert sentences == [{"text": f"train {n} ☃"} for n in range(9)]  # no label, nothing of dev or test
    runs = [Path(command[-1]).name.rpartition("-")[0] for command in asked[1:] if command[0] != "evaluate"]
    assert runs == ["from-scratch-1", "from-scratch-2", "full-1"]
    assert asked[5][-6:-2] == ["--optim.lr", "5e-4", "--seed", "1"]  # full, at the rate of from scratch
    assert asked[1][-7:-2] == ["s", "--optim.lr", "5e-4", "--seed", "1"] and f"{data}/sst3-dev.jsonl" in asked[1]
    assert not any("sst3-test" in word for command in asked if command[0] != "evaluate" for word in command)
    rows = records.load(out / "finetuning.json")
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("majority", 0), ("from-scratch", 1), ("from-scratch", 2), ("full", 1)
    ]  # fmt: skip
    assert rows[0]["test"] == {"accuracy": 0.5, "macro_f1": pytest.approx(2 / 9)}  # F1 of 2/3, 0 and 0
    assert rows[2]["test"] == {"loss": 0.5, "accuracy": 0.52, "macro_f1": 0.4} and rows[2]["dev"]["accuracy"] == 0.25
    assert rows[1]["cpu_seconds"] == 9.0 and rows[1]["peak_bytes"] == 3 << 20


def test_a_stopped_comparison_goes_on(
    data: Path, commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["finetuning", "--data", str(data), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "results")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "SEEDS", {})
        patch.setattr(finetuning, "variants", lambda task, options: {"full": options, "prompt": options})
        commands.failing = ("prompt",)
        assert main(argv) == 2
        assert re.search(r"prompt-1-[0-9a-f]{8} ended with exit code 1", capsys.readouterr().err)
        path = tmp_path / "results" / "finetuning.json"
        assert [row["method"] for row in records.load(path)] == ["majority", "full"]
        commands.failing = ()
        assert main(argv) == 0
        assert [Path(command[-1]).name[:6] for command in commands.asked[-2:]] == ["prompt", "--json"]
        assert {row["method"] for row in records.load(path)} == {"majority", "full", "prompt"}
        count = len(commands.asked)
        assert main(argv) == 0
        assert [command[0] for command in commands.asked[count:]] == ["train"]  # nothing is run twice
        patch.setattr(finetuning, "TUNE", ["--epochs", "1"])
        main(argv)
        assert len(commands.asked) == count + 1 + 1 + 2 * 2  # other settings: all anew


def test_missing_sentences_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetuning", "--data", str(tmp_path)]) == 2
    assert "sst3-test.jsonl missing: --data names the folder" in capsys.readouterr().err


def test_the_table_has_means_and_deviations(tmp_path: Path) -> None:
    about = {**ABOUT, "examples": 2210, "recipe": []}
    made = [{"method": "majority", "seed": 0, "test": {"accuracy": 0.5, "macro_f1": 0.25}, **about}]
    for seed, score in ((1, 0.5), (2, 0.6)):
        test = {"accuracy": score, "macro_f1": 0.5}
        made.append({"method": "from-scratch", "seed": seed, "test": test, "cpu_seconds": 9.0 * seed, **SIZES, **about})
    made.append({**made[1], "method": "prompt", "cpu_seconds": None})
    made.insert(0, {**made[1], "method": "full", "quick": True})
    records.save(tmp_path / "finetuning.json", made)
    text = tables.rewritten("<!-- table:finetuning -->\n<!-- /table -->\n", tmp_path).splitlines()
    assert "| majority | 0.250 | 0.500 | – | – | – | – |" in text
    assert "| from scratch | 0.500 ± 0.000 | 0.550 ± 0.071 | 10 (25.0%) | 2 KiB | 3 MiB | 14 |" in text
    assert "| prompt | 0.500 | 0.500 | 10 (25.0%) | 2 KiB | 3 MiB | – |" in text
    assert not any(line.startswith("| full") for line in text)  # measured with --quick alone
    assert any(line.startswith("2,210 test sentences; ± is the standard deviation over 2 seeds") for line in text)
