"""`python -m benchmarks unbalanced`: what helps a rare class.

One function in twenty is of the family `imports` (minillm/data/stdlib_tasks.py), the others are not. A small encoder,
pretrained on the same library, learns to tell them apart in three ways: every example alike, rare ones with more
weight, batches with both classes equally often. Each model decides in two ways: for the likelier class, and from the
threshold that was tuned on its validation data. Each fold is scored on examples that neither weights nor thresholds
have seen; over the folds every example is scored once.

A fold is a command of minillm in a process of its own and leaves a run in WORK; what is measured already stays.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import records
from benchmarks.finetuning import _short, pretrained
from benchmarks.records import Row
from minillm.commands.series import finish
from minillm.commands.tasks import examples_of, opened_means
from minillm.evaluation.classification import class_scores, classification_scores, confusion
from minillm.loading import open_model
from minillm.tasks.catalogue import TASKS, known_task
from minillm.tasks.division import divide
from minillm.training.signals import Signals, Stopped

FILE, DATA, FOLDS = "unbalanced.json", "stdlib-unbalanced", 3
PRETRAIN = ["--preset", "mlm-tiny"]
TUNE = ["--task", "classify", "--data", DATA, "--epochs", "3", "--train.eval-every", "40"]
WAYS = {"alike": ["--class-weights", "off"], "weighted": ["--class-weights", "on"], "balanced": ["--balance"]}
QUICK = {"pretrain": ["--steps", "2", "--tokenizer.vocab-size", "512"], "tune": ["--steps", "2"]}


def run(seeds: int, work: Path, out: Path, *, quick: bool) -> int:
    """Measures what out/unbalanced.json lacks, and prints the file.

    Raises ValueError where a run ends with an error that its lines above have told.
    """
    path, pretrain = out / FILE, [*PRETRAIN, *(QUICK["pretrain"] if quick else [])]
    tune = [*TUNE, *(QUICK["tune"] if quick else [])]
    work.mkdir(parents=True, exist_ok=True)
    try:
        with Signals():
            base = work / f"pretrained-{_short(pretrain)}"
            pretrained(base, pretrain)
            for seed, fold, way in [(s, f, w) for s in range(1, seeds + 1) for f in range(1, FOLDS + 1) for w in WAYS]:
                recipe = [*pretrain, *tune, *WAYS[way], "--seed", str(seed), "--fold", f"{fold}/{FOLDS}"]
                if any(row["recipe"] == recipe for row in records.load(path)):
                    continue
                print(f"--- {way}, seed {seed}, fold {fold}", file=sys.stderr, flush=True)
                folder = work / f"{way}-{seed}-{fold}-{_short(recipe)}"
                if code := finish([str(base), *recipe[len(pretrain) :]], folder):
                    raise ValueError(f"{folder} ended with exit code {code}")
                row = {"way": way, "seed": seed, "fold": fold, "recipe": recipe, "quick": quick}
                row |= scored(folder, seed, fold) | records.provenance()
                records.save(path, [*records.load(path), row])
    except Stopped as stopped:
        return stopped.code
    print(path.read_text(encoding="utf-8"))
    return 0


def scored(run: Path, seed: int, fold: int) -> Row:
    """The finished model of a run on the examples that its fold held out, by both ways to decide."""
    opened = open_model(run)
    model: Any = opened.model
    task: Any = known_task(opened.config["task"])
    blank = TASKS["classify"]()
    test = divide(blank, examples_of(blank, DATA), seed=seed, fold=(fold, FOLDS)).test
    data = task.data(test, opened_means(opened))
    p, rare = task.probabilities(model, data), int(np.argmin(task.counts))
    tuned = task.decide(p, model)
    model.threshold.fill_(float("nan"))
    return {
        "examples": len(test),
        "rare": int((data.targets == rare).sum()),
        "likelier": _scores(data.targets, task.decide(p, model), rare),
        "threshold": _scores(data.targets, tuned, rare),
    }


def _scores(truth: np.ndarray, decided: np.ndarray, rare: int) -> dict[str, float]:
    of_rare = {name: float(values[rare]) for name, values in class_scores(confusion(truth, decided, 2)).items()}
    kept = {name: of_rare[name] for name in ("precision", "recall", "f1")}
    return kept | {"macro_f1": classification_scores(truth, decided, 2)["macro_f1"]}
