"""`python -m benchmarks tasks`: the default run of each task, `minillm finetune MODEL --task TASK` and nothing else.

Encoders learn labels, tags, numbers and answers; the decoder writes. Where no finished runs of the two presets are
named they are pretrained first, in WORK. The time is that of the whole command, from its start to its last line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import runs
from benchmarks.records import Row
from minillm.commands.running import say

FILE = "tasks.json"
BASES = {
    "classify": "mlm-tiny", "regress": "mlm-tiny", "tag": "mlm-tiny", "span-qa": "mlm-tiny",
    "seq2seq": "default", "chat": "default", "lm": "default", "preference": "default",
}  # fmt: skip
"""Task -> the preset of the model that learns it."""


def run(tasks: list[str], bases: dict[str, Path], work: Path, out: Path, *, quick: bool) -> int:
    """Runs each task anew and replaces its row in out/tasks.json.

    Args:
        bases: runs by their presets, of those that are pretrained already.

    Raises ValueError for an unknown task, and where a command fails.
    """
    if unknown := [task for task in tasks if task not in BASES]:
        raise ValueError(f"--task {unknown[0]}: there are {', '.join(BASES)}")
    return runs.keep(out / FILE, rows(tasks or list(BASES), bases, work, quick=quick), ["task"], quick=quick)


def rows(tasks: list[str], bases: dict[str, Path], work: Path, *, quick: bool) -> Iterator[Row]:
    """Measures each task when its row is asked for."""
    pretrain, tune = runs.options([], [], quick=quick)
    for task in tasks:
        preset = BASES[task]
        base = bases.get(preset) or runs.pretrained(
            work / f"{preset}{'-quick' if quick else ''}", ["--preset", preset, *pretrain]
        )
        say(f"--- {task}")
        options = [str(base), "--task", task, "--overwrite", *tune]
        yield {"task": task, "base": preset} | measured(options, work / task)


def measured(options: list[str], folder: Path) -> Row:
    start = time.perf_counter()
    runs.minillm("finetune", *options, "--out", str(folder))
    seconds = time.perf_counter() - start
    result, config = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("result.json", "config.json")
    )
    kept = {name: result[name] for name in ("steps", "best_step", "cpu_seconds", "peak_bytes")}
    examples, threads = config["corpus"]["documents"], config["plan"]["threads"]
    return {"seconds": seconds, "examples": examples, "threads": threads, **kept, **result["against"]}
