"""What benchmarks share that are made of minillm's commands: a base is pretrained, and its finetunings are compared.

Each command is a process of its own and leaves a run in WORK. A benchmark that is stopped ends with the signal's exit
code, and goes on where it was: a run with what is left of it, and what has its row in the result file stays.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import Row
from minillm.commands.series import finish
from minillm.training.signals import Signals, Stopped


def options(pretrain: list[str], tune: list[str], *, quick: bool) -> tuple[list[str], list[str]]:
    """Options of a pretraining and of its finetunings, with what --quick adds to them."""
    if not quick:
        return pretrain, tune
    return [*pretrain, "--steps", "2", "--tokenizer.vocab-size", "512"], [*tune, "--steps", "2"]


def keep(path: Path, rows: Iterator[Row], same: Sequence[str], *, quick: bool) -> int:
    """Writes each row as soon as there is one, and prints the file in the end; the exit code.

    Args:
        rows: measures while it is drawn from.
        same: the names that tell a case; a row takes the place of the one that was there of its case.
    """
    try:
        with Signals():
            for found in rows:
                row = found | {"quick": quick} | records.provenance()
                others = [r for r in records.load(path) if any(r[name] != row[name] for name in (*same, "quick"))]
                records.save(path, [*others, row])
    except Stopped as stopped:
        return stopped.code
    print(path.read_text(encoding="utf-8"))
    return 0


def lacks(path: Path, recipe: list[Any]) -> bool:
    """Whether no row of the file was measured with these options, those of its base among them."""
    return all(row["recipe"] != recipe for row in records.load(path))


def short(recipe: list[Any]) -> str:
    """Eight digits that part runs with other settings."""
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]


def pretrained(base: Path, options: list[str]) -> Path:
    """`base`, where the run of `minillm train OPTIONS` was begun, or gone on with, to its end."""
    begun = (base / "config.json").is_file()
    minillm("train", *(["--resume", str(base)] if begun else [*options, "--out", str(base)]))
    return base


def finetuned(run: Path, argv: list[str]) -> Path:
    """`run`, where `minillm finetune ARGV` came to its end. Raises ValueError where it ends with an error."""
    if code := finish(argv, run):
        raise ValueError(f"{run} ended with exit code {code}")
    return run


def minillm(*argv: str) -> str:
    """stdout of a command in a process of its own, which is stopped with this one. Raises ValueError where it fails."""
    with subprocess.Popen([sys.executable, "-m", "minillm.cli", *argv], stdout=subprocess.PIPE, text=True) as process:
        try:
            shown, _ = process.communicate()
        except Stopped:
            process.terminate()
            raise
    if process.returncode:
        raise ValueError(f"minillm {argv[0]} ended with exit code {process.returncode}")
    return shown
