"""`python -m benchmarks unbalanced`: what helps a rare class.

One function in twenty is of the family `imports` (minillm/data/stdlib_tasks.py), the others are not. A small encoder,
pretrained on the same library, learns to tell them apart in three ways: every example alike, rare ones with more
weight, batches with both classes equally often. Each model decides in two ways: for the likelier class, and from the
threshold that was tuned on its validation data. Each fold is scored on examples that neither weights nor thresholds
have seen; over the folds every example is scored once.

A fold is a command of minillm and leaves a run in WORK; what is measured already stays (benchmarks/runs.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import runs
from benchmarks.records import Row
from minillm.commands.running import say
from minillm.commands.tasks import examples_of, opened_means
from minillm.evaluation.classification import class_scores, classification_scores, confusion
from minillm.loading import open_model
from minillm.tasks.catalogue import TASKS, known_task
from minillm.tasks.division import divide

FILE, DATA, FOLDS = "unbalanced.json", "stdlib-unbalanced", 3
PRETRAIN = ["--preset", "mlm-tiny"]
TUNE = ["--task", "classify", "--data", DATA, "--epochs", "3", "--train.eval-every", "40", "--train.patience", "7"]
"""To the end of three epochs: the eight rare examples of validation choose the best step, but do not stop a run."""
WAYS = {"alike": ["--class-weights", "off"], "weighted": ["--class-weights", "on"], "balanced": ["--balance"]}


def run(seeds: int, work: Path, out: Path, *, quick: bool) -> int:
    """Measures what out/unbalanced.json lacks, and prints the file.

    Raises ValueError where there is nothing to run, or a run ends with an error that its lines above have told.
    """
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: give the number of times that all folds are run, 1 or more")
    return runs.keep(out / FILE, rows(seeds, work, out / FILE, quick=quick), ["way", "seed", "fold"], quick=quick)


def rows(seeds: int, work: Path, path: Path, *, quick: bool) -> Iterator[Row]:
    """Measures each fold that `path` lacks when its row is asked for."""
    pretrain, tune = runs.options(PRETRAIN, TUNE, quick=quick)
    base = runs.pretrained(work / f"pretrained-{runs.short(pretrain)}", pretrain)
    for seed, fold, way in itertools.product(range(1, seeds + 1), range(1, FOLDS + 1), WAYS):
        options = [*tune, *WAYS[way], "--seed", str(seed), "--fold", f"{fold}/{FOLDS}"]
        recipe = [*pretrain, *options]
        if runs.lacks(path, recipe):
            say(f"--- {way}, seed {seed}, fold {fold}")
            run = runs.finetuned(work / f"{way}-{seed}-{fold}-{runs.short(recipe)}", [str(base), *options])
            yield {"way": way, "seed": seed, "fold": fold, "recipe": recipe} | scored(run, seed, fold)


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
