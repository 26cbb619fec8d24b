"""`minillm finetune … --folds K`: cross-validation, the mean and the spread of what K models are worth.

    mean = Σ x_k / K        standard deviation = sqrt(Σ (x_k − mean)² / (K − 1))

x_k is a metric of the model of fold k on the K-th of the examples that it was not trained on, and by which neither its
best step nor its thresholds were chosen (minillm/tasks/division.py). OUT/folds.json keeps all x_k and both figures.
"""

import math
import re
from statistics import fmean, stdev
from typing import Any

from minillm.commands.series import Series, State, without
from minillm.config import UserError


def parse_fold(text: str | None) -> dict[str, int] | None:
    """{"number": 2, "of": 5} of "2/5". Raises `UserError`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not (count >= 2 and 1 <= number <= count):
        raise UserError(f"--fold {text}: write which fold of how many, from 1/5 to 5/5 for five")
    return {"number": number, "of": count}


def runs(state: State) -> dict[str, list[str]]:
    """fold-1, fold-2 … -> the options of each."""
    common = [arg for arg in without(state["argv"], "--folds", "--out") if arg != "--overwrite"]
    return {f"fold-{k}": [*common, "--fold", f"{k}/{state['folds']}"] for k in range(1, state["folds"] + 1)}


def summary(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each metric that is a number in every fold its mean, standard deviation and values."""
    scores = [result["metrics"] for result in results.values()]
    names = [n for n in scores[0] if all(isinstance(s.get(n), float) and math.isfinite(s[n]) for s in scores)]
    values = {name: [s[name] for s in scores] for name in names}
    return {name: {"mean": fmean(x), "std": stdev(x), "values": x} for name, x in values.items()}


def _lines(state: State) -> list[str]:
    state["summary"] = summary(state["results"])
    shown = [f"  {name:<22}{found['mean']:.4f} ± {found['std']:.4f}" for name, found in state["summary"].items()]
    title = f"{state['folds']} folds, each scored on what it was not trained on; mean ± standard deviation:"
    return [title, *shown]


FOLDS = Series(file="folds.json", what="a cross-validation", runs=runs, lines=_lines, needs_all=True)
