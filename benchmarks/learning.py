"""`python -m benchmarks learning`: what each lever of the speed recipe gains, and how soon a run gets where others get.

ladder   one small model on tiny Shakespeare by characters and on the standard library's source, each lever added in
         turn, equal steps and tokens, several seeds: validation bits per byte against tokens, seconds and FLOPs
without  the whole recipe of the ladder less one lever at a time: what each is worth to the others
width    the same model narrow and wide, at several learning rates, with and without `optim.transfer`: where the best is
plain    the five-minute run without its dropout of n-grams, which nothing shorter has a use for
goals    an unmodified nanoGPT (`--nanogpt`) with its README's settings for a CPU, and the recipe in a sixth of its wall
         time, in all of it, and in five minutes; and the default run in five minutes

Each run is a process of its own. A wall time is that of the whole process: imports, compilation, planning, baselines,
validation, report. A loss is the mean over every target of the validation text in consecutive windows of the model's
context; nanoGPT's own split (first 90 % to train), its best checkpoint scored by that same rule. The recipe was chosen
on a third split: trained on the first 90 % of nanoGPT's training part, judged on that part's last 10 %.

What is measured already is not measured again: a run that was stopped goes on with the first case that is missing.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.nanogpt import PEER, train_nanogpt
from benchmarks.plots import draw_ladder, draw_widths
from benchmarks.records import ROOT, Row

PARTS = ("peer", "short", "equal", "long", "default", "plain", "ladder", "without", "width")
SIZE = [
    "--model.layers", "3", "--model.heads", "2", "--model.dim", "128", "--model.context", "128", "--train.batch", "16",
    "--train.micro-batch", "16", "--train.sample-tokens", "1", "--data.no-separate",
]  # fmt: skip
STEPS = 120
RUNGS: list[tuple[str, list[str]]] = [
    (
        "AdamW, cosine, GELU, tied",
        [
            "--optim.name", "adamw", "--optim.schedule", "cosine", "--optim.lr", "3e-3", "--model.mlp.kind", "gelu",
            "--model.attention.no-qk-norm",
        ],
    ),
    ("Muon", ["--optim.name", "muon"]),
    ("QK-norm", ["--model.attention.qk-norm"]),
    ("ReLU²", ["--model.mlp.kind", "relu2"]),
    ("untied head", ["--model.no-tied"]),
    ("normed embeddings with a rate of their own", ["--model.norm.embedding", "--optim.embedding-lr", "0.05"]),
    ("rates by width", ["--optim.lr", "6e-3", "--optim.transfer"]),
    ("falling to zero over 70 %", ["--optim.schedule", "wsd", "--optim.decay", "0.7", "--optim.final-lr", "0.0"]),
    ("n-gram embeddings, 2 to 4", ["--model.speedrun.ngrams", "4"]),
]  # fmt: skip
CORPORA = ("tiny Shakespeare", "standard library")

WIDTHS, WIDTH_STEPS = (64, 128, 256, 512), 60
RATES = ("2e-3", "4e-3", "8e-3", "16e-3")
ADAMW = [word for _, added in (RUNGS[0], *RUNGS[2:6]) for word in added]
"""What the recipe is made of up to the rates by width, but with AdamW for all: Muon's step knows its matrix's shape."""

XZ, A100, CPU = "xz -9", 1.4697, 1.58
SPEEDRUN = ["--preset", "speedrun-char"]
START = {"short": 7.0, "equal": 10.0, "default": 60.0, "long": 60.0, "plain": 60.0}
"""Seconds that a process spends besides what `--minutes` counts: on trying and compiling first, or on a longer text."""
RESERVE = 0.96
"""Share of the rest that is planned: how long steps take is a prediction."""
SHORT = [
    "--compile", "off", "--model.dim", "128", "--model.layers", "2", "--model.heads", "2",
    "--model.context", "64", "--train.batch", "24", "--train.micro-batch", "24",
]  # fmt: skip
LONG = ["--model.speedrun.ngram-dropout", "0.5"]


def run(
    text: Path | None, nanogpt: Path | None, parts: Sequence[str], seeds: int, work: Path, out: Path, *, quick: bool
) -> int:
    """Measures what out/learning.json lacks of `parts`, draws the ladder, prints the goals.

    Raises ValueError where a part lacks its text or its peer, or a run fails.
    """
    path = out / "learning.json"
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--part {unknown[0]}: there are {', '.join(PARTS)}")
    text = text or (nanogpt / "data/shakespeare_char/input.txt" if nanogpt else None)
    if text is None or not text.is_file():
        raise ValueError(f"{text or 'no text'}: give tiny Shakespeare (input.txt of char-rnn) with --text FILE")
    if nanogpt is None and "peer" in parts and not done(path, {"kernel": PEER}, quick):
        parts = [part for part in parts if part not in ("peer", "short", "equal")]
        print("without --nanogpt PATH there is no peer: peer, short and equal are left out", file=sys.stderr)
    work.mkdir(parents=True, exist_ok=True)
    several = {"ladder": partial(ladder, seeds=seeds), "without": without, "width": widths}
    for part in parts:
        if part == "peer":
            if not done(path, {"kernel": PEER}, quick):
                assert nanogpt is not None
                keep(path, train_nanogpt(nanogpt, text, work / "nanogpt", steps=20 if quick else 2000), quick)
            continue
        one_goal = partial(goal, part, text, peer_of(path, quick), quick=quick)
        for case, argv in several[part](text, work, quick=quick) if part in several else [one_goal()]:
            measure(path, case, argv, work / "run", quick=quick)
    rows = [row for row in records.load(path) if row["quick"] == quick]
    docs = out if quick else ROOT / "docs"
    for kernel, draw, name in (("ladder", draw_ladder, "learning.png"), ("width", draw_widths, "width.png")):
        if any(row["kernel"] == kernel for row in rows):
            print(draw(rows, docs / name))
    print("\n".join(f"{line['goal']}: {line['ours']}; {'met' if line['met'] else 'not met'}" for line in goals(rows)))
    return 0


def ladder(text: Path, work: Path, *, seeds: int, quick: bool) -> Iterator[tuple[Row, list[str]]]:
    """(case, options) of every rung, corpus by corpus; the corpora are tokenized once."""
    for corpus in CORPORA:
        for seed in range(1, seeds + 1):
            options = small(corpus, text, work, seed, quick=quick)
            for rung, (name, added) in enumerate(RUNGS):
                options += added
                shape = {"corpus": corpus, "rung": rung, "seed": seed}
                yield {"kernel": "ladder", "shape": shape, "name": name}, list(options)


def without(text: Path, work: Path, *, quick: bool) -> Iterator[tuple[Row, list[str]]]:
    """(case, options) of the whole recipe less each lever, corpus by corpus, with seed 1."""
    for corpus in CORPORA:
        for rung, (name, _) in [*enumerate(RUNGS)][1:]:
            levers = [word for other, (_, added) in enumerate(RUNGS) if other != rung for word in added]
            shape = {"corpus": corpus, "rung": rung}
            case = {"kernel": "without", "shape": shape, "name": name}
            yield case, small(corpus, text, work, 1, quick=quick) + levers


def small(corpus: str, text: Path, work: Path, seed: int, *, quick: bool) -> list[str]:
    """The options that all runs of a ladder share."""
    steps = 4 if quick else STEPS
    shared = ["--data", str(prepared(corpus, text, work)), "--steps", str(steps), "--seed", str(seed)]
    return [*SIZE, *shared, "--train.eval-every", str(max(1, steps // 5))]


def widths(text: Path, work: Path, *, quick: bool) -> Iterator[tuple[Row, list[str]]]:
    """(case, options) of each width and learning rate, with rates by width and without."""
    data, steps = prepared(CORPORA[0], text, work), 4 if quick else WIDTH_STEPS
    for dim, lr, transfer in itertools.product(WIDTHS, RATES, (False, True)):
        options = [*SIZE, *ADAMW, "--data", str(data), "--steps", str(steps), "--train.eval-every", str(steps)]
        options += ["--model.dim", str(dim), "--model.heads", str(dim // 32), "--optim.lr", lr]
        shape = {"dim": dim, "lr": float(lr), "transfer": transfer}
        yield {"kernel": "width", "shape": shape}, [*options, *(["--optim.transfer"] if transfer else [])]


def prepared(corpus: str, text: Path, work: Path) -> Path:
    """The folder of a corpus's tokenizer and shards, made where it is not there yet."""
    data = work / corpus.replace(" ", "-")
    if (data / "tokenizer").is_dir():
        return data
    shutil.rmtree(data, ignore_errors=True)
    character = corpus == CORPORA[0]
    source, share = (str(text), "0.1") if character else ("stdlib", "0.05")
    config = ["--model.layers", "1", "--model.dim", "8", "--model.heads", "1", "--model.context", "8", "--steps", "1"]
    run = data.with_name("made")
    kind = ["--tokenizer.type", "char"] if character else []
    train([*config, *kind, "--data", source, "--data.validation", share, "--train.sample-tokens", "1"], run)
    shutil.copytree(run / "data", data)
    shutil.copytree(run / "tokenizer", data / "tokenizer", dirs_exist_ok=True)
    return data


def goal(part: str, text: Path, peer: Row | None, *, quick: bool) -> tuple[Row, list[str]]:
    """(case, options) of a run against the clock: its time is the peer's share that it has, or five minutes."""
    share = {"short": 1 / 6, "equal": 1.0}.get(part)
    if share and peer is None:
        raise ValueError(f"{part} is a share of nanoGPT's time: measure that first with --part peer --nanogpt PATH")
    wall = share * peer["wall"] if share and peer else 300.0
    options = {
        "short": [*SPEEDRUN, *SHORT], "equal": [*SPEEDRUN, "--compile", "off"], "long": [*SPEEDRUN, *LONG],
        "plain": SPEEDRUN, "default": ["--preset", "default"],
    }[part]  # fmt: skip
    minutes = max(0.02, RESERVE * (wall - START[part])) / 60
    data = [] if part == "default" else ["--data", str(text)]
    case = {"kernel": "goal", "shape": {"goal": part}, "allowed": wall}
    length = ["--steps", "3"] if quick else ["--minutes", f"{minutes:.4f}"]
    return case, [*options, *data, *length, "--train.sample-tokens", "1"]


def measure(path: Path, case: Row, argv: list[str], run: Path, *, quick: bool) -> None:
    """Runs one case and keeps its row, where it is not there yet."""
    if done(path, case, quick):
        return
    print(f"--- {case['kernel']} {json.dumps(case['shape'])}", file=sys.stderr, flush=True)
    wall = train(argv, run)
    # Files by their names alone: where they lie on this machine is nobody's business.
    options = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    keep(path, case | {"options": options} | result(run, wall), quick)


def train(argv: list[str], run: Path) -> float:
    """Wall time in seconds of `python train.py ARGV` in a process of its own. Raises ValueError where it fails."""
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "train.py"), *argv, "--out", str(run), "--overwrite"]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise ValueError(f"train.py {' '.join(argv)} ended with {ended.returncode}: {ended.stderr[-400:]}")
    return time.perf_counter() - began


def result(run: Path, wall: float) -> Row:
    """What a finished run tells: the validation curve, its end, and what it cost."""
    from minillm import preflight
    from minillm.config import ModelConfig, from_dict

    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    val = [line for line in lines if line.get("split") == "val"]
    model = from_dict(ModelConfig, config["settings"]["model"])
    baselines = next(line for line in lines if line.get("event") == "baselines")
    curve = [{name: line[name] for name in ("step", "tokens", "seconds", "loss", "bits_per_byte")} for line in val]
    plan = config["plan"]
    share = plan["seconds_per_validation"] * len(val) / max(1e-9, val[-1]["seconds"])
    return {
        "wall": wall, "loss": val[-1]["loss"], "bits_per_byte": val[-1]["bits_per_byte"], "curve": curve,
        "tokens": val[-1]["tokens"], "flops_per_token": preflight.flops_per_token(model), "xz": baselines.get("xz"),
        "parameters": sum(preflight.parameters(model).values()), "validation_share": share,
        "dtype": plan["dtype"], "threads": plan["threads"], "compile": plan["compile"],
    }  # fmt: skip


def goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """goal, ours and met (in words, and whether) of each goal that was measured."""
    found = {row["shape"]["goal"]: row for row in rows if row["kernel"] == "goal"}
    peer = next((row for row in rows if row["kernel"] == PEER), None)
    wanted = {
        "short": (peer["loss"] if peer else None, "nanoGPT's CPU result in 1/6 of its wall time"),
        "equal": (CPU, "in nanoGPT's wall time"),
        "long": (A100, "nanoGPT's A100 result in 5 minutes"),
        "default": (None, f"{XZ} on the standard library's source in 5 minutes"),
    }
    lines = []
    for name, (target, words) in wanted.items():
        if name not in found:
            continue
        row = found[name]
        unit, key = ("bits per byte", "bits_per_byte") if name == "default" else ("nats", "loss")
        target = row["xz"] if name == "default" else target
        met = row[key] <= target and row["wall"] <= row["allowed"]
        goal = f"{words}: ≤ {target:.4f} {unit} in {row['allowed']:.1f} s"
        lines.append({"goal": goal, "ours": f"{row[key]:.4f} in {row['wall']:.1f} s", "met": met, "peer": peer})
    return lines


def keep(path: Path, row: Row, quick: bool) -> None:
    row = row | records.provenance() | {"quick": quick, "environment_threads": os.environ.get("OMP_NUM_THREADS")}
    records.save(path, records.merge(records.load(path), [{"shape": {}, **row}]))


def done(path: Path, case: Row, quick: bool) -> bool:
    key = records.case_key({"shape": {}, **case, "quick": quick})
    return any(records.case_key({**row, "dtype": None}) == key for row in records.load(path))


def peer_of(path: Path, quick: bool) -> Row | None:
    return next((row for row in records.load(path) if row["kernel"] == PEER and row["quick"] == quick), None)
