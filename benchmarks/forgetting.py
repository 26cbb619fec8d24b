"""`python -m benchmarks forgetting`: what a finetuning costs the old task, and what keeps it.

A small decoder is pretrained on the standard library's source and then learns to answer questions about it. Its loss on
held-out source is read before and after, by every finetuning (minillm/training/keeping.py).

Each part is a command of minillm in a process of its own and leaves a run in WORK; what is measured already stays.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import records
from benchmarks.finetuning import _short, pretrained
from benchmarks.records import Row
from minillm.commands.series import finish
from minillm.training.signals import Signals, Stopped

FILE = "forgetting.json"
PRETRAIN = ["--preset", "default", "--steps", "300"]
TUNE = ["--task", "chat", "--steps", "60", "--train.eval-every", "20"]
WAYS = {"nothing": [], "replay 1": ["--replay", "1"], "L2 0.01": ["--l2-start", "0.01"]}
"""What is done against forgetting."""
QUICK = {"pretrain": ["--steps", "2", "--tokenizer.vocab-size", "512"], "tune": ["--steps", "2"]}


def run(work: Path, out: Path, *, quick: bool) -> int:
    """Measures what out/forgetting.json lacks, and prints the file.

    Raises ValueError where a run ends with an error that its lines above have told.
    """
    path, pretrain = out / FILE, [*PRETRAIN, *(QUICK["pretrain"] if quick else [])]
    tune = [*TUNE, *(QUICK["tune"] if quick else [])]
    work.mkdir(parents=True, exist_ok=True)
    try:
        with Signals():
            base = work / f"pretrained-{_short(pretrain)}"
            pretrained(base, pretrain)
            for way, options in WAYS.items():
                recipe = [*pretrain, *tune, *options]
                if any(row["recipe"] == recipe for row in records.load(path)):
                    continue
                print(f"--- against forgetting: {way}", file=sys.stderr, flush=True)
                folder = work / f"{_short(recipe)}"
                if code := finish([str(base), *tune, *options], folder):
                    raise ValueError(f"{folder} ended with exit code {code}")
                row = {"way": way, "recipe": recipe, "quick": quick} | losses(folder) | records.provenance()
                records.save(path, [*records.load(path), row])
    except Stopped as stopped:
        return stopped.code
    print(path.read_text(encoding="utf-8"))
    return 0


def losses(run: Path) -> Row:
    """Of a finished run: on replies and on the old text, before its first step and by the model that came of it."""
    metrics = json.loads((run / "result.json").read_text(encoding="utf-8"))["metrics"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first = next(line["loss"] for line in lines if line.get("split") == "val")
    old = {f"old_{when}": metrics[f"old_loss_{when}"] for when in ("before", "after")}
    return {"new_before": first, "new_after": metrics["loss"], **old}
