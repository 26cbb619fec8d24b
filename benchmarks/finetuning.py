"""`python -m benchmarks finetuning --data DIR`: what pretraining is worth, and each method of finetuning.

DIR/sst3-train.jsonl, -dev.jsonl and -test.jsonl: sentences from film reviews in three classes (the Stanford Sentiment
Treebank, Socher et al. 2013), `text` and `label`. A small encoder learns to fill in masks in the training sentences,
whose labels it does not see; from there every method finetunes it, and beside them stand the same model from random
weights and the most frequent class. The best step is chosen on dev; test is read once, by the model that came of it.

Each part is a command of minillm in a process of its own and leaves a run in WORK; what was stopped goes on, and what
is measured already is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import Row
from minillm.commands.comparing import SCRATCH, variants
from minillm.commands.series import finish
from minillm.training.signals import Signals, Stopped

FILE = "finetuning.json"
PRETRAIN = ["--preset", "mlm-tiny", "--steps", "1000", "--model.dropout", "0.1"]
TUNE = ["--task", "classify", "--epochs", "3", "--train.eval-every", "267"]  # twice an epoch
OWN = {"full": ["--optim.lr", "1e-3"]}
"""The rate at which training from scratch goes by default too: the two then differ in their first weights alone."""
QUICK = {"pretrain": ["--steps", "2", "--tokenizer.vocab-size", "512"], "tune": ["--steps", "2"]}
SEEDS = {SCRATCH: (1, 2, 3), "full": (1, 2, 3)}
"""Of the two whose difference is the question; the others are run once."""


def run(data: Path, work: Path, out: Path, *, quick: bool) -> int:
    """Measures what out/finetuning.json lacks, and prints all of it.

    Raises ValueError where a file is missing, or a run ends with an error that its lines above have told.
    """
    files = {split: data / f"sst3-{split}.jsonl" for split in ("train", "dev", "test")}
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        raise ValueError(f"{', '.join(missing)} missing: --data names the folder of sst3-train, -dev and -test.jsonl")
    path, pretrain = out / FILE, [*PRETRAIN, *(QUICK["pretrain"] if quick else [])]
    tune = [*TUNE, *(QUICK["tune"] if quick else [])]
    try:
        with Signals():
            base = work / f"pretrained-{_short(pretrain)}"
            pretrained(base, [*pretrain, "--data", str(sentences(files["train"], work))])
            _keep(path, majority(files["train"], files["test"]) | {"recipe": [], "quick": quick})
            options = [str(base), *tune, "--data", str(files["train"]), "--val", str(files["dev"])]
            for name, seed, argv in cases(options):
                recipe = [*pretrain, *tune, *OWN.get(name, []), name, seed]
                if not _done(path, recipe):
                    print(f"--- {name}, seed {seed}", file=sys.stderr, flush=True)
                    row = tuned(argv, work / f"{name}-{seed}-{_short(recipe)}", files["test"])
                    about = {"method": name, "seed": seed, "recipe": recipe, "quick": quick}
                    _keep(path, about | row | records.provenance())
    except Stopped as stopped:
        return stopped.code
    print(path.read_text(encoding="utf-8"))
    return 0


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


def pretrained(base: Path, options: list[str]) -> None:
    """Finishes the run `base` of `minillm train OPTIONS`, or begins it."""
    begun = (base / "config.json").is_file()
    minillm("train", *(["--resume", str(base)] if begun else [*options, "--out", str(base)]))


def majority(train: Path, test: Path) -> Row:
    """The scores of the class that most training sentences have."""
    labels, truth = ([_label(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in (train, test))
    always = Counter(labels).most_common(1)[0][0]
    right = truth.count(always) / len(truth)
    scores = {"accuracy": right, "macro_f1": 2 * right / (1 + right) / len(set(truth))}
    return {"method": "majority", "seed": 0, "test": scores, "examples": len(truth), **records.provenance()}


def _label(line: str) -> str:
    return json.loads(line)["label"]


def tuned(argv: list[str], folder: Path, test: Path) -> Row:
    """One finetuning to its end, and its scores on the test sentences."""
    if code := finish(argv, folder):
        raise ValueError(f"{folder} ended with exit code {code}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    scores = json.loads(minillm("evaluate", str(folder), "--data", str(test), "--json"))
    names = ("loss", "accuracy", "macro_f1")
    kept = ("steps", "best_step", "trained_parameters", "parameters", "adapter_bytes", "peak_bytes", "cpu_seconds")
    row = {"test": {n: scores[n] for n in names}, "dev": {n: result["metrics"][n] for n in names}}
    return row | {"examples": scores["examples"]} | {name: result[name] for name in kept}


def _short(recipe: list[Any]) -> str:
    """Eight digits that part runs with other settings."""
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]


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


def _done(path: Path, recipe: list[Any]) -> bool:
    return any(row["recipe"] == recipe for row in records.load(path))


def _keep(path: Path, row: Row) -> None:
    """Writes the row, in the place of one of the same method and seed."""
    same = ("method", "seed", "quick")
    others = [r for r in records.load(path) if any(r[name] != row[name] for name in same)]
    records.save(path, [*others, row])
