"""The benchmarks of rare classes and of forgetting: which runs they make, what they keep, and the README's tables."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import forgetting, records, tables, unbalanced
from benchmarks.__main__ import main
from minillm.data.records import Record
from tests.benchmarks.made import ABOUT, Commands


def test_every_fold_in_every_way_and_none_twice(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unbalanced, "scored", lambda run, seed, fold: {"examples": 10 * seed + fold})
    argv = ["unbalanced", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert main(argv) == 0
    assert commands.asked[0][:-2] == ["train", *unbalanced.PRETRAIN] and len(commands.asked) == 10
    ends = [command[command.index("--train.patience") + 2 : -2] for command in commands.asked[1:]]
    assert ends[0] == ["--class-weights", "off", "--seed", "1", "--fold", "1/3"]
    assert ends[5] == ["--balance", "--seed", "1", "--fold", "2/3"]
    assert main([*argv, "--seeds", "2"]) == 0 and len(commands.asked) == 10 + 1 + 9
    found = [
        (row["way"], row["seed"], row["fold"], row["examples"]) for row in records.load(tmp_path / "unbalanced.json")
    ]
    assert len(set(found)) == 18 and ("weighted", 2, 3, 23) in found
    capsys.readouterr()
    assert main([*argv, "--seeds", "0"]) == 2 and "--seeds 0: give the number of times" in capsys.readouterr().err


def test_a_fold_is_scored_by_both_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 1 is rare: at 0.5 one of two is found, from 0.3 on both and a wrong one."""
    p = np.array([[0.9, 0.1], [0.65, 0.35], [0.2, 0.8], [0.6, 0.4]])
    truth, model = np.array([0, 0, 1, 1]), SimpleNamespace(threshold=torch.tensor([float("nan"), 0.3]))
    from minillm.tasks.texts import Classify

    monkeypatch.setattr(Classify, "probabilities", lambda self, model, data: p)
    monkeypatch.setattr(Classify, "data", lambda self, examples, means: SimpleNamespace(targets=truth))
    info = {"name": "classify", "info": {"labels": ["a", "b"], "multi": False, "counts": [9, 1]}}
    opened = SimpleNamespace(model=model, config={"task": info})
    made = [Record(f"f:{n}", {"text": str(n), "label": "ab"[n % 2]}) for n in range(12)]
    monkeypatch.setattr(unbalanced, "open_model", lambda run: opened)
    monkeypatch.setattr(unbalanced, "examples_of", lambda task, data: task.examples(made))
    monkeypatch.setattr(unbalanced, "opened_means", lambda opened: None)
    row = unbalanced.scored(Path("run"), 1, 2)
    assert (row["examples"], row["rare"]) == (4, 2)
    assert row["likelier"] == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "macro_f1": pytest.approx(0.733, abs=1e-3),
    }
    assert row["threshold"] == {
        "precision": pytest.approx(2 / 3),
        "recall": 1.0,
        "f1": 0.8,
        "macro_f1": pytest.approx(0.733, abs=1e-3),
    }


def test_each_way_against_forgetting_once(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["forgetting", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert main(argv) == 0 and main(argv) == 0
    asked = [command for command in commands.asked if command[0] != "train"]
    assert [command[2:-2] for command in asked] == [[*forgetting.TUNE, *way] for way in forgetting.WAYS.values()]
    row: dict[str, Any] = records.load(tmp_path / "forgetting.json")[1]
    losses = {"new_before": 2.5, "new_after": 1.5, "old_before": 3.0, "old_after": 3.25}
    assert row["way"] == "replay 1" and losses.items() <= row.items()
    text = tables.rewritten("<!-- table:forgetting -->\n<!-- /table -->\n", tmp_path)
    assert "| replay 1 | 2.500 | 1.500 | 3.000 | 3.250 | +0.250 |" in text.splitlines()


def test_the_table_of_the_rare_class_has_means_and_deviations(tmp_path: Path) -> None:
    made = []
    for fold, f1 in ((1, 0.5), (2, 0.6)):
        scores = {"precision": 0.25, "recall": 1.0, "f1": f1, "macro_f1": 0.75}
        found = {"likelier": scores, "threshold": {**scores, "f1": 0.7}, "examples": 842, "rare": 42}
        made.append({"way": "weighted", "seed": 1, "fold": fold, "recipe": [fold], **found, **ABOUT})
    records.save(tmp_path / "unbalanced.json", made)
    text = tables.rewritten("<!-- table:unbalanced -->\n<!-- /table -->\n", tmp_path).splitlines()
    assert (
        "| class weights | the likelier class | 0.550 ± 0.071 | 0.250 ± 0.000 | 1.000 ± 0.000 | 0.750 ± 0.000 |" in text
    )
    assert any("| class weights | the tuned threshold | 0.700 ± 0.000 |" in line for line in text)
    assert any(
        line.startswith("Mean ± standard deviation over 2 folds of 842 held-out examples, 42 rare") for line in text
    )
