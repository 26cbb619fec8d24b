"""metrics.jsonl when a run goes on: each line once, and none lost to one that was cut."""

import json
from pathlib import Path

import pytest

from minillm.training.run import Metrics, cut_metrics, read_metrics

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
