"""`python -m benchmarks tasks`: the default run of each task, `minillm finetune MODEL --task TASK` and nothing else.

Encoders learn labels, tags, numbers and answers; the decoder writes. Where no finished runs of the two presets are
named they are pretrained first, in WORK. The time is that of the whole command, from its start to its last line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks import records
from benchmarks.finetuning import minillm, pretrained
from benchmarks.records import Row
from minillm.training.signals import Signals, Stopped

FILE = "tasks.json"
BASES = {
    "classify": "mlm-tiny", "regress": "mlm-tiny", "tag": "mlm-tiny", "span-qa": "mlm-tiny",
    "seq2seq": "default", "chat": "default", "lm": "default", "preference": "default",
}  # fmt: skip
"""Task -> the preset of the model that learns it."""
QUICK = {"base": ["--steps", "2"], "run": ["--steps", "2"]}


def run(tasks: list[str], bases: dict[str, Path], work: Path, out: Path, *, quick: bool) -> int:
    """Runs each task anew and replaces its row in out/tasks.json.

    Args:
        bases: runs by their presets, of those that are pretrained already.

    Raises ValueError for an unknown task, and where a command fails.
    """
    path = out / FILE
    if unknown := [task for task in tasks if task not in BASES]:
        raise ValueError(f"--task {unknown[0]}: there are {', '.join(BASES)}")
    try:
        with Signals():
            for task in tasks or BASES:
                preset = BASES[task]
                base = bases.get(preset) or work / preset
                if preset not in bases:
                    pretrained(base, ["--preset", preset, *(QUICK["base"] if quick else [])])
                print(f"--- {task}", file=sys.stderr, flush=True)
                options = [str(base), "--task", task, "--overwrite", *(QUICK["run"] if quick else [])]
                row = measured(task, options, work / task)
                about = {"task": task, "base": preset, "quick": quick, **records.provenance()}
                others = [r for r in records.load(path) if (r["task"], r["quick"]) != (task, quick)]
                records.save(path, [*others, about | row])
    except Stopped as stopped:
        return stopped.code
    print(path.read_text(encoding="utf-8"))
    return 0


def measured(task: str, options: list[str], folder: Path) -> Row:
    start = time.perf_counter()
    minillm("finetune", *options, "--out", str(folder))
    seconds = time.perf_counter() - start
    result, config = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("result.json", "config.json")
    )
    kept = {name: result[name] for name in ("steps", "best_step", "cpu_seconds", "peak_bytes")}
    examples, threads = config["corpus"]["documents"], config["plan"]["threads"]
    return {"seconds": seconds, "examples": examples, "threads": threads, **kept, **result["against"]}
