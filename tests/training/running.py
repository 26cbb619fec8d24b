"""Real runs, small enough for a test: a language of kilobytes, a model of one layer, the command as typed."""

import json
import os
import random
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minillm.cli import run as command

ROOT = Path(__file__).parents[2]
WORDS = shlex.split(
    "the quick brown fox jumps over a lazy dog and sleeps under old trees while rain falls on green hills"
)
TRAIN = "--train.batch 4 --train.threads 1 --train.sample-tokens 2 --train.log-every 1 --tokenizer.vocab-size 300"
SMALL = shlex.split(f"--model.layers 1 --model.dim 32 --model.heads 2 --model.context 16 {TRAIN}")
TINY = ["--preset", "llama-tiny", "--model.kv-heads", "1", *SMALL]
ENCODER = ["--preset", "mlm-tiny", *SMALL]
ENCODER_DECODER = ["--preset", "seq2seq-tiny", *SMALL]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def write_text(path: Path, sentences: int = 150, seed: int = 0) -> Path:
    """Random sentences of known words: 40 bytes each, learnable within a few steps."""
    choose = random.Random(seed).choice
    lines = (" ".join(choose(WORDS) for _ in range(9)) + ".\n" for _ in range(sentences))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def train(capsys: pytest.CaptureFixture[str], *argv: Any) -> Result:
    """`minillm train ARGV` in this process; the parser's own exit counts as the command's."""
    capsys.readouterr()
    try:
        code = command("train", [str(arg) for arg in argv])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def start(*argv: Any, **environment: str) -> subprocess.Popen[str]:
    """The same in a process of its own, which can be killed."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, argv)],
        cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def lines(run: Path, split: str) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if line.get("split") == split]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if line.get("event") == name]


def losses(run: Path) -> list[tuple[str, int, float, int]]:
    """(split, step, loss, targets) of every line, in the order of the file; floats as exact as they were written."""
    return [(x["split"], x["step"], x["loss"], x["targets"]) for x in metrics(run) if "split" in x]
