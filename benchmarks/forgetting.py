"""`python -m benchmarks forgetting`: what a finetuning costs the old task, and what keeps it.

A small decoder is pretrained on the standard library's source and then learns to answer questions about it. Its loss on
held-out source is read before and after, by every finetuning (minillm/training/keeping.py).

Each part is a command of minillm and leaves a run in WORK; what is measured already stays (benchmarks/runs.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks import runs
from benchmarks.records import Row
from minillm.commands.running import say

FILE = "forgetting.json"
PRETRAIN = ["--preset", "default", "--steps", "300"]
TUNE = ["--task", "chat", "--steps", "60", "--train.eval-every", "20"]
WAYS = {"nothing": [], "replay 1": ["--replay", "1"], "L2 0.01": ["--l2-start", "0.01"]}
"""What is done against forgetting."""


def run(work: Path, out: Path, *, quick: bool) -> int:
    """Measures what out/forgetting.json lacks, and prints the file.

    Raises ValueError where a run ends with an error that its lines above have told.
    """
    return runs.keep(out / FILE, rows(work, out / FILE, quick=quick), ["way"], quick=quick)


def rows(work: Path, path: Path, *, quick: bool) -> Iterator[Row]:
    """Measures each way that `path` lacks when its row is asked for."""
    pretrain, tune = runs.options(PRETRAIN, TUNE, quick=quick)
    base = runs.pretrained(work / f"pretrained-{runs.short(pretrain)}", pretrain)
    for way, options in WAYS.items():
        recipe = [*pretrain, *tune, *options]
        if runs.lacks(path, recipe):
            say(f"--- against forgetting: {way}")
            run = runs.finetuned(work / runs.short(recipe), [str(base), *tune, *options])
            yield {"way": way, "recipe": recipe} | losses(run)


def losses(run: Path) -> Row:
    """Of a finished run: on replies and on the old text, before its first step and by the model that came of it."""
    metrics = json.loads((run / "result.json").read_text(encoding="utf-8"))["metrics"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first = next(line["loss"] for line in lines if line.get("split") == "val")
    old = {f"old_{when}": metrics[f"old_loss_{when}"] for when in ("before", "after")}
    return {"new_before": first, "new_after": metrics["loss"], **old}
