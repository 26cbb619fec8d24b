"""`python -m benchmarks finetuning --data DIR`: what pretraining is worth, and each method of finetuning.

DIR/sst3-train.jsonl, -dev.jsonl and -test.jsonl: sentences from film reviews in three classes (the Stanford Sentiment
Treebank, Socher et al. 2013), `text` and `label`. A small encoder learns to fill in masks in the training sentences,
whose labels it does not see; from there every method finetunes it, and beside them stand the same model from random
weights and the most frequent class. The best step is chosen on dev; test is read once, by the model that came of it.

Each part is a command of minillm and leaves a run in WORK; what was stopped goes on, and what is measured already is
not measured again (benchmarks/runs.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import runs
from benchmarks.records import Row
from minillm.commands.comparing import SCRATCH, variants
from minillm.commands.running import say

FILE = "finetuning.json"
PRETRAIN = ["--preset", "mlm-tiny", "--steps", "4000", "--model.dropout", "0.1"]
TUNE = ["--task", "classify", "--epochs", "3", "--train.eval-every", "267"]  # twice an epoch
OWN = {name: ["--optim.lr", "5e-4"] for name in (SCRATCH, "full")}
"""One rate for both, so that they differ in their first weights alone: each scored best on dev with it, `full` among
2e-4, 5e-4 and 1e-3, training from scratch among 5e-4, 1e-3 and 2e-3 (seed 1). The others have their default rates.
"""
SEEDS = {SCRATCH: (1, 2, 3), "full": (1, 2, 3)}
"""Of the two whose difference is the question; the others are run once."""


def run(data: Path, work: Path, out: Path, *, quick: bool) -> int:
    """Measures what out/finetuning.json lacks, and prints all of it.

    Raises ValueError where a file is missing, or a run ends with an error that its lines above have told.
    """
    files = {split: data / f"sst3-{split}.jsonl" for split in ("train", "dev", "test")}
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        raise ValueError(f"{', '.join(missing)} missing: --data names the folder of sst3-train, -dev and -test.jsonl")
    return runs.keep(out / FILE, rows(files, work, out / FILE, quick=quick), ["method", "seed"], quick=quick)


def rows(files: dict[str, Path], work: Path, path: Path, *, quick: bool) -> Iterator[Row]:
    """Measures each method and seed that `path` lacks when its row is asked for."""
    pretrain, tune = runs.options(PRETRAIN, TUNE, quick=quick)
    text = sentences(files["train"], work)
    base = runs.pretrained(work / f"pretrained-{runs.short(pretrain)}", [*pretrain, "--data", str(text)])
    yield {"method": "majority", "seed": 0, "recipe": []} | majority(files["train"], files["test"])
    for name, seed, argv in cases([str(base), *tune, "--data", str(files["train"]), "--val", str(files["dev"])]):
        recipe = [*pretrain, *tune, *OWN.get(name, []), name, seed]
        if runs.lacks(path, recipe):
            say(f"--- {name}, seed {seed}")
            run = runs.finetuned(work / f"{name}-{seed}-{runs.short(recipe)}", argv)
            yield {"method": name, "seed": seed, "recipe": recipe} | scored(run, files["test"])


def cases(options: list[str]) -> Iterator[tuple[str, int, list[str]]]:
    """(method, seed, options of `minillm finetune`), those first that are to be compared most closely."""
    found = variants("classify", options)
    chosen = [(name, seed) for name in found for seed in SEEDS.get(name, (1,))]
    for name, seed in sorted(chosen, key=lambda case: (case[0] not in SEEDS, case[1])):
        yield name, seed, [*found[name], *OWN.get(name, []), "--seed", str(seed)]


def sentences(train: Path, work: Path) -> Path:
    """A file of the training texts alone."""
    text = work / "sentences.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    found = [json.loads(line)["text"] for line in train.read_text(encoding="utf-8").splitlines()]
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in found), encoding="utf-8")
    return text


def majority(train: Path, test: Path) -> Row:
    """The scores of the class that most training sentences have."""
    labels, truth = ([_label(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in (train, test))
    always = Counter(labels).most_common(1)[0][0]
    right = truth.count(always) / len(truth)
    scores = {"accuracy": right, "macro_f1": 2 * right / (1 + right) / len(set(truth))}
    return {"test": scores, "examples": len(truth)}


def _label(line: str) -> str:
    return json.loads(line)["label"]


def scored(run: Path, test: Path) -> Row:
    """Of a finished run: what it took, and its scores on dev and on the test sentences."""
    result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    scores = json.loads(runs.minillm("evaluate", str(run), "--data", str(test), "--json"))
    names = ("loss", "accuracy", "macro_f1")
    kept = ("steps", "best_step", "trained_parameters", "parameters", "adapter_bytes", "peak_bytes", "cpu_seconds")
    row = {"test": {n: scores[n] for n in names}, "dev": {n: result["metrics"][n] for n in names}}
    return row | {"examples": scores["examples"]} | {name: result[name] for name in kept}
